"""Embedding-to-Prefix: a frozen causal LM with a user's projected vector in front of its prompt.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), user_embedding=vectors)

`model.backbone` is the LM without a prefix.
"""

import copy
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import cached_file

from .configuration_e2p import E2PConfig
from .items_e2p import ITEMS, E2PItemHead, Float32, WithItems, positions_of

PROJECTORS = {}  # by kind; the export writes them at the end of this file, all in every export
LENGTHS = ("max_length", "min_length")  # of a prompt and its answer together


class E2PProjector(Float32):
    """User vectors [B, E] -> soft tokens [B, K, D], in float32; a vector of NaN is the null user's."""

    def __init__(self, config: E2PConfig):
        super().__init__()
        e, d = config.embedding_size, config.backbone_config.get_text_config().hidden_size
        self.num_own_tokens, self.max_rms = config.num_soft_tokens - config.num_shared_tokens, config.max_soft_token_rms
        self.make_layers(config, e, self.num_own_tokens * d)
        if config.num_shared_tokens:
            self.shared = nn.Parameter(torch.zeros(config.num_shared_tokens * d))
        if config.null_user:
            self.null_user = nn.Parameter(torch.zeros(e))
        for name, size in [("input_mean", e), ("input_std", e), ("token_mean", d), ("token_std", d)]:
            self.register_buffer(name, torch.zeros(size))

    def forward(self, vectors):
        with torch.autocast(vectors.device.type, enabled=False):
            return self.project(vectors)

    def project(self, vectors):
        x = (vectors.float() - self.input_mean) / self.input_std
        if hasattr(self, "null_user"):
            x = torch.where(x[..., :1].isnan(), self.null_user, x)
        y = self.apply_layers(x)
        if hasattr(self, "shared"):
            y = torch.cat([y, self.shared.expand(*y.shape[:-1], -1)], dim=-1)
        return self.placed(y.unflatten(-1, (-1, len(self.token_mean))))

    def placed(self, y):
        """[..., D] of unit variance -> soft tokens among the token embeddings, none longer than the bound."""
        soft = self.token_mean + self.token_std * y
        if not self.max_rms:
            return soft
        size = soft.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20).detach()
        unit = soft / size  # whose squares float32 holds
        root = unit.square().mean(dim=-1, keepdim=True).clamp(min=1e-20).sqrt()
        return torch.where(size * root > self.max_rms, unit * (self.max_rms / root), soft)


class E2PForCausalLM(WithItems, PreTrainedModel, GenerationMixin):
    """`forward` and `generate` take what the LM takes, and `user_embedding`; `rank_items` ranks a catalogue."""

    config_class = E2PConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["projector", "item_head"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config, backbone=None):
        super().__init__(config)
        self.backbone = backbone or AutoModelForCausalLM.from_config(config.backbone_config)
        self._no_split_modules = self.backbone._no_split_modules
        if config.backbone_config.model_type in ("gemma", "gemma2") and not hasattr(
            self.get_input_embeddings(), "embed_scale"
        ):
            raise ValueError(
                "this version of transformers multiplies Gemma's `inputs_embeds`, soft tokens included, instead of its "
                "token embeddings alone; upgrade transformers"
            )
        self.projector = PROJECTORS[config.projector_kind](config)
        if config.num_items:
            self.item_head = E2PItemHead(config)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: every weight is read."""

    @classmethod
    def from_pretrained(cls, directory, *args, config=None, **kwargs):
        """Reads projector and items here and, unless it is here as well, the LM from where the config names it.

        Raises:
          ValueError: the LM's weights are not those that the projector was trained in front of.
        """
        if config is None:
            config = E2PConfig.from_pretrained(directory)
        local = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "subfolder") if key in kwargs}
        items = cached_file(directory, ITEMS, **local) if config.num_items else None
        if config.backbone is None:
            loaded = super().from_pretrained(directory, *args, config=config, **kwargs)
            if items:
                (loaded[0] if isinstance(loaded, tuple) else loaded).read_items(items)
            return loaded
        named = config.backbone
        path = Path(named["path"])
        if not path.is_dir():
            path = Path(snapshot_download(named["path"], revision=named["revision"]))
        if fingerprint(path) != named["fingerprint"]:
            raise ValueError(
                f"{path}: not the weights this projector was trained in front of (fingerprint "
                f"{named['fingerprint'][:12]}); point config.json's `backbone` at those, or export with the backbone"
            )
        for key in (*local, "adapter_kwargs", "trust_remote_code", "_from_auto", "code_revision"):
            kwargs.pop(key, None)
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", config.dtype))
        config.backbone = None  # it is in the model now, and in whatever `save_pretrained` writes
        # By the config that is here: that in `path` may have changed since, with the same weights beside it.
        kwargs["config"] = config.backbone_config
        if named.get("key_mapping"):  # the files hold a language model among others
            kwargs["key_mapping"] = named["key_mapping"]
        model = cls(config, AutoModelForCausalLM.from_pretrained(path, *args, **kwargs))
        model.generation_config = GenerationConfig.from_pretrained(directory, **local)
        weights = load_file(cached_file(directory, "model.safetensors", **local))
        for name, part in model.named_children():
            if name != "backbone":
                held = {key.partition(".")[2]: value for key, value in weights.items() if key.startswith(f"{name}.")}
                part.load_state_dict(held)
                part.to(model.backbone.device)
        if items:
            model.read_items(items)
        return model.eval()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self):
        return self.backbone.get_output_embeddings()

    def forward(self, input_ids=None, attention_mask=None, user_embedding=None, labels=None, **kwargs):
        """The LM's forward over sequences that are K soft tokens longer than `input_ids`, logits included.

        Soft tokens that stand before every reply make each K longer; rows with fewer replies than another are padded on
        the left.

        Args:
          input_ids: [B, T].
          attention_mask: [B, T]; padding may stand on either side.
          user_embedding: [B, E], or [E] for all rows; NaN for a user without a vector, if `config.null_user`.
          labels: [B, T]; soft tokens are never labels.

        Raises:
          ValueError: no vector, one of the wrong width or number, padding that cannot be told from text, or a cache,
            positions or embeddings that have no place for the soft tokens.
        """
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and cache.get_seq_length():
            raise ValueError("the soft tokens are in the cache already: go on from it with model.backbone")
        inputs = self.with_prefix(input_ids, attention_mask, user_embedding, labels, kwargs)
        del inputs["input_ids"]
        positions = kwargs.pop("position_ids", None)
        if positions is None:
            positions = positions_of(inputs["attention_mask"])
        elif positions.shape[-1] != inputs["attention_mask"].shape[1]:
            raise ValueError(
                f"position_ids has {positions.shape[-1]} columns; needs {inputs['attention_mask'].shape[1]}, the soft "
                "tokens' included: leave it out"
            )
        return self.backbone(**inputs, position_ids=positions, **kwargs)

    def setting(self, name, options):
        """What `generate` with these options goes by."""
        given = options.get("generation_config")
        values = [options.get(name), getattr(given, name, None), getattr(self.generation_config, name)]
        return next((value for value in values if value is not None), None)

    @torch.no_grad()
    def generate(self, input_ids=None, attention_mask=None, user_embedding=None, item_ids=None, **kwargs):
        """As the LM's `generate`; the returned sequences begin with `input_ids`, without the soft tokens.

        Padding may stand on either side: what stands on the right is moved to the left for the LM. Lengths do not count
        the soft tokens.

        With `config.item_token` an item stands in front of the reply, which `return_dict_in_generate=True` names, as
        `item_ids`: the best one, or where tokens are sampled one that is, too; beams of a prompt share it.

        Args:
          item_ids: B ids, of the items to stand there in place of those.
        """
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        inputs, places = self.prompts(input_ids, attention_mask, user_embedding, kwargs), None
        if self.config.item_token:
            inputs, places = self.with_items(inputs, item_ids, kwargs)
        elif item_ids is not None:
            raise ValueError("no item stands in front of replies here (config.item_token): leave item_ids out")
        length = inputs["attention_mask"].shape[1]
        count = length - input_ids.shape[1]
        self.backbone.generation_config = longer(self.generation_config, count)
        if kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = longer(kwargs["generation_config"], count)
        for name in LENGTHS:
            if kwargs.get(name):
                kwargs[name] += count
        output = self.backbone.generate(**inputs, **kwargs)
        new = (output if isinstance(output, torch.Tensor) else output.sequences)[:, length:]
        each = len(new) // len(input_ids)
        prompts = input_ids.to(new.device).repeat_interleave(each, dim=0)
        sequences = torch.cat([prompts, new], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        if places is not None:
            output.item_ids = [self.item_ids[place] for place in places for _ in range(each)]
        return output

    def prompts(self, input_ids, attention_mask, user_embedding, options):
        """`with_prefix` for `generate`: the padding on the left."""
        inputs = self.with_prefix(input_ids, attention_mask, user_embedding, None, options)
        mask = inputs["attention_mask"]
        empty = (mask.sum(dim=1) == self.config.num_soft_tokens).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"row {empty[0]} of input_ids is all padding: leave it out")
        if options.get("cache", options.get("past_key_values")) is not None and (mask.diff(dim=1) < 0).any():
            raise ValueError("a cache goes on from its last token: pad on the left")
        behind = (mask == 0).flip(1).long().cumprod(dim=1).sum(dim=1).tolist()
        return {
            name: torch.stack([row.roll(places, 0) for row, places in zip(rows, behind, strict=True)])
            for name, rows in inputs.items()
        }

    def with_prefix(self, input_ids, attention_mask, user_embedding, labels, options):
        """`input_ids`, `inputs_embeds`, `attention_mask` and `labels` with the soft tokens in place.

        Among `input_ids`, which penalties for repetition look at, a soft token is the token beside it once more.

        Args:
          options: the other arguments of the call.
        """
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise ValueError("input_ids is needed, not inputs_embeds: the soft tokens stand among the prompt's tokens")
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; needs [B, T], one token or more a row")
        soft = self.soft_tokens(user_embedding, input_ids)
        embeds = self.get_input_embeddings()(input_ids)
        mask = self.real_tokens(input_ids, attention_mask, options)
        firsts, real = mask.argmax(dim=1).tolist(), mask.any(dim=1).tolist()
        count, length = self.config.num_soft_tokens, input_ids.shape[1]
        sources, slots = [], []  # of each row, where every position comes from: a token, and a soft token or -1
        for ids, first, any_real in zip(input_ids.tolist(), firsts, real, strict=True):
            source, slot = list(range(length)), [-1] * length
            # A row of padding has no place, and nobody reads it.
            for start in reversed(self.slot_starts(ids, first) if any_real else [0]):
                source[start:start] = [max(start - 1, first)] * count
                slot[start:start] = range(count)
            sources.append(source)
            slots.append(slot)
        longest = max(map(len, sources))
        padding = [longest - len(source) for source in sources]
        sources = [[0] * left + source for left, source in zip(padding, sources, strict=True)]
        slots = [[-2] * left + slot for left, slot in zip(padding, slots, strict=True)]
        source, slot = (torch.tensor(values, device=input_ids.device) for values in (sources, slots))
        row = torch.arange(len(source), device=embeds.device)[:, None]
        there, which = source.to(embeds.device), slot.to(embeds.device)
        soft = soft.to(embeds.device, embeds.dtype)[row, which.clamp(min=0)]
        inputs = {
            "input_ids": input_ids.gather(1, source),
            "inputs_embeds": torch.where(which[..., None] >= 0, soft, embeds[row, there]),
            "attention_mask": mask.gather(1, source).masked_fill(slot >= 0, 1).masked_fill(slot == -2, 0),
        }
        if labels is not None:
            inputs["labels"] = labels.gather(1, source.to(labels.device)).masked_fill(
                slot.to(labels.device) != -1, -100
            )
        return inputs

    def real_tokens(self, input_ids, attention_mask, options):
        """[B, T] of 0 for padding and 1: the mask, or what `generate` of transformers makes of the ids without one.

        Raises:
          ValueError: a mask of another shape, or none where the ids leave open what is padding.
        """
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; needs {tuple(input_ids.shape)}, as "
                    "input_ids: the soft tokens are put in here"
                )
            return attention_mask.to(input_ids.device).ne(0).long()
        pad, stops = self.setting("pad_token_id", options), self.setting("eos_token_id", options)
        padding = torch.zeros_like(input_ids, dtype=torch.bool) if pad is None else input_ids == pad
        if pad not in (stops if isinstance(stops, list) else [stops]):
            return (~padding).long()
        for side in (padding, padding.flip(1)):
            run = side.long().cumprod(dim=1).sum(dim=1)
            if (run > 1).any() or (run != run[0]).any():
                raise ValueError(
                    "attention_mask is missing, and the padding token also ends turns, so that the one cannot be told "
                    "from the other: pass the tokenizer's attention_mask"
                )
        return torch.ones_like(input_ids)

    def soft_tokens(self, user_embedding, input_ids):
        """[B, K, D] float32 for the rows of `input_ids`."""
        if user_embedding is None:
            raise ValueError("user_embedding is missing: pass a vector for every row (model.backbone takes none)")
        vectors = torch.as_tensor(user_embedding, device=self.projector.input_mean.device)
        width, rows = self.config.embedding_size, len(input_ids)
        if vectors.ndim == 1:
            vectors = vectors.expand(rows, -1)
        if vectors.shape != (rows, width):
            raise ValueError(f"user_embedding has shape {tuple(vectors.shape)}; needs [{rows}, {width}]")
        unusable = ~torch.isfinite(vectors)
        if self.config.null_user:
            unusable &= ~vectors.isnan().all(dim=1, keepdim=True)
        if unusable.any():
            raise ValueError("user_embedding holds NaN or infinity")
        return self.projector(vectors)

    def slot_starts(self, ids, first):
        """Finds where the soft tokens of one row stand; `first` is its first token that is not padding."""
        if self.config.placement == "before_bos":
            return [first]
        if self.config.placement == "after_bos":
            return [first + 1]
        if self.config.placement == "before_reply":
            wanted, offset = self.config.reply_opening["ids"], self.config.reply_opening["offset"]
            opens = [start for start in range(first, len(ids)) if ids[start : start + len(wanted)] == wanted]
            if not opens:
                raise ValueError("no reply opens in the prompt: apply_chat_template(..., add_generation_prompt=True)")
            return [max(start + offset, first + 1) for start in opens]
        turn = self.config.user_turn
        for start in [first] if turn["opening"] else range(first, len(ids)):
            end = start + len(turn["ids"])
            if ids[start:end] == turn["ids"]:
                for expected in turn["tail"]:
                    if ids[end : end + 1] != [expected]:
                        break
                    end += 1
                return [end]
        if turn["opening"]:
            raise ValueError(
                "the prompt does not begin with a user turn, and this model's chat template opens turns with plain "
                "text, which a system message could spell out: leave the system message out"
            )
        raise ValueError("no user turn in the prompt: use tokenizer.apply_chat_template")


def longer(settings, count):
    """A copy of a GenerationConfig whose lengths count so many soft tokens as well."""
    settings, default = copy.deepcopy(settings), GenerationConfig()
    for name in LENGTHS:
        if getattr(settings, name) not in (None, getattr(default, name)):
            setattr(settings, name, getattr(settings, name) + count)
    return settings


def fingerprint(directory):
    """SHA-256 over every tensor's name, dtype, shape and SHA-256, in name order."""
    names = ["model.safetensors"]
    if not (directory / names[0]).is_file():
        names = set(
            json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"].values()
        )
    files = [safe_open(directory / name, framework="pt") for name in names]
    where = {name: file for file in files for name in file.keys()}

    def line(name):
        tensor = where[name].get_tensor(name).contiguous()
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        return f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {digest}\n".encode()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b"".join(pool.map(line, sorted(where)))).hexdigest()


E2PConfig.register_for_auto_class()
E2PForCausalLM.register_for_auto_class("AutoModelForCausalLM")
