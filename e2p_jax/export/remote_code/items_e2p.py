"""A catalogue's items: scored where a reply begins, and in front of its words."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

ITEMS = "items.json"  # in the order of their rows: ids, and the tokens that replies open with, none where they are free


class Float32(nn.Module):
    """`model.half()` or `model.to("cuda", dtype)` casts the LM; what is here moves only, and stays float32."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class E2PItemHead(Float32):
    """States [B, D] that replies begin from -> logits [B, I] of the items as the answer."""

    def __init__(self, config):
        super().__init__()
        d = config.backbone_config.get_text_config().hidden_size
        self.rows = nn.Parameter(torch.zeros(config.num_items, config.item_size))
        self.query = nn.Linear(d, config.item_size)
        if config.item_token:
            self.said = nn.Parameter(torch.zeros(config.num_items, config.item_size))
            self.token = nn.Linear(config.item_size, d, bias=False)

    def forward(self, states):
        states = states.to(self.rows.device).float()
        with torch.autocast(states.device.type, enabled=False):
            unit = states * (states.square().sum(dim=-1, keepdim=True) + 1e-20).rsqrt()
            return self.query(unit) @ self.rows.T

    def tokens(self, places):
        """[B] -> [B, D], of unit variance: what stands for these items in front of a reply."""
        with torch.autocast(places.device.type, enabled=False):
            return self.token(self.rows[places] + self.said[places])


class Opening(LogitsProcessor):
    """Replies begin with these tokens: B lists, each for as many rows, behind `start` tokens."""

    def __init__(self, openings, start):
        self.openings, self.start = openings, start

    def __call__(self, input_ids, scores):
        step, each = input_ids.shape[1] - self.start, len(scores) // len(self.openings)
        for row, opening in enumerate(self.openings):
            if step < len(opening):
                rows = scores[row * each : (row + 1) * each]
                rows.fill_(-torch.inf)
                rows[:, opening[step]] = 0.0  # whatever another processor, say of repetitions, made of it
        return scores


class WithItems:
    """What `E2PForCausalLM` does with `item_head`; ids and openings are there if it was read from a directory."""

    item_ids = item_openings = ()

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        self._write_items(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        self._write_items(working_dir)  # `save_pretrained(push_to_hub=True)` uploads before it returns
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_items(self, directory):
        if self.item_ids:
            held = {"ids": self.item_ids, "openings": self.item_openings}
            (Path(directory) / ITEMS).write_text(json.dumps(held) + "\n", encoding="utf-8")

    def read_items(self, path):
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        self.item_ids, self.item_openings = held["ids"], held["openings"]

    @torch.no_grad()
    def rank_items(self, input_ids, attention_mask=None, user_embedding=None, top_k=10):
        """The catalogue's items as the answer to each conversation, best first.

        Args:
          input_ids: [B, T], `attention_mask` and `user_embedding` as `generate` takes them. A conversation ends where
            the reply begins: `apply_chat_template(..., add_generation_prompt=True)`.
          top_k: how many; None for all.

        Returns:
          B lists of k ids, and their logits [B, k] in float32.

        Raises:
          ValueError: there is no catalogue, or what `generate` refuses.
        """
        if not self.config.num_items:
            raise ValueError("this model has no catalogue: the run that it was exported from had no data.items")
        scores, _ = self.item_scores(self.prompts(input_ids, attention_mask, user_embedding, {}))
        best = scores.topk(min(top_k or scores.shape[1], scores.shape[1]), dim=1)
        return [[self.item_ids[place] for place in row] for row in best.indices.tolist()], best.values

    def item_scores(self, inputs, **kwargs):
        """Logits [B, I] of what `prompts` gives, and the output of the LM without its head."""
        mask = inputs["attention_mask"]
        output = self.backbone.base_model(
            inputs_embeds=inputs["inputs_embeds"], attention_mask=mask, position_ids=positions_of(mask), **kwargs
        )
        return self.item_head(output.last_hidden_state[:, -1]), output

    def with_items(self, inputs, item_ids, options):
        """`inputs` with an item behind each prompt, and the items' places; `options` get the prompts' cache."""
        if options.get("cache", options.get("past_key_values")) is not None:
            raise ValueError("an item stood in front of the reply that the cache holds: leave the cache out")
        scores, output = self.item_scores(inputs, use_cache=True)
        if item_ids is not None:
            row = {item: place for place, item in enumerate(self.item_ids)}
            if len(item_ids) != len(scores) or not row.keys() >= set(item_ids):
                raise ValueError(f"item_ids: needs {len(scores)} ids of {ITEMS}, one a prompt; got {item_ids}")
            places = torch.tensor([row[item] for item in item_ids], device=scores.device)
        elif self.setting("do_sample", options):
            scores = scores / (self.setting("temperature", options) or 1.0)
            for name, limit in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
                if value := self.setting(name, options):
                    scores = limit(value)(None, scores)
            places = torch.multinomial(scores.softmax(dim=1), 1)[:, 0]
        else:
            places = scores.argmax(dim=1)
        tokens = self.projector.placed(self.item_head.tokens(places).to(self.projector.token_mean.device))
        last = {name: value[:, -1:] for name, value in inputs.items()}
        last["inputs_embeds"] = tokens[:, None].to(last["inputs_embeds"])
        # Versions before 5.24 read no embeddings behind a cache; beams, and a cache of another kind, begin anew.
        several = any((self.setting(name, options) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
        own = self.setting("use_cache", options) is False or self.setting("cache_implementation", options)
        if "cache" in output and not several and not own:
            options["cache"] = output.cache
        inputs, places = {name: torch.cat([each, last[name]], dim=1) for name, each in inputs.items()}, places.tolist()
        if self.item_openings:
            opening = Opening([self.item_openings[place] for place in places], inputs["inputs_embeds"].shape[1])
            options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or ()), opening])
        return inputs, places


def positions_of(mask):
    """As `generate` counts them: left to itself, an LM counts the padding on the left as positions."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
