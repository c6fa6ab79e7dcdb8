"""The same training step in PyTorch: as public code has it, as well as its libraries allow, and PEFT's.

Each peer trains what we train, on the examples that we train on, and gives the loss that we give.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft
import torch
import transformers
import work
from peers import LeftOut, Peer, Stage
from torch import nn
from torch.nn.attention import flex_attention

Batch = dict[str, Any]
Loss = Callable[[Batch], torch.Tensor]


class Projector(nn.Module):
    """`e2p_jax.prefix.projector.Projector` of kind mlp, with its values and without dropout."""

    def __init__(self, values: dict[str, np.ndarray]):
        super().__init__()
        for name, value in values.items():
            tensor = torch.tensor(value)
            if name.startswith(("input_", "token_")):
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, nn.Parameter(tensor))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """[..., E] -> [..., D], one soft token."""
        x = (vectors - self.input_mean) / self.input_std
        y = x @ self.skip + self.bias + nn.functional.silu(x @ self.up + self.up_bias) @ self.down
        return self.token_mean + self.token_std * y


def padded(conversations: work.Conversations, device: str) -> Batch:
    """A batch as long as its longest example; labels are -100 but at targets. The slot stands first."""
    examples, vectors = conversations
    length = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), length), np.int64)
    labels = np.full_like(tokens, -100)
    attention = np.zeros_like(tokens)
    for row, example in enumerate(examples):
        count = len(example.tokens)
        tokens[row, :count], attention[row, :count] = example.tokens, 1
        labels[row, :count][example.is_target] = example.tokens[example.is_target]
    arrays = {"tokens": tokens, "labels": labels, "attention_mask": attention, "vectors": np.stack(vectors)}
    return {name: torch.tensor(array, device=device) for name, array in arrays.items()}


def adam_step(parameters: Sequence[nn.Parameter], loss: Loss, batch: Batch) -> Callable[[], torch.Tensor]:
    """A step of AdamW on mean loss, with the clip that we have; returns the loss, not waited for."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return value.detach()

    return step


def evaluate(loss: Loss, batch: Batch) -> float:
    with torch.no_grad():
        return loss(batch).item()


def on_turns(
    name: str, stage: Stage, loss: Loss, parameters: list[nn.Parameter], prompt: torch.Tensor | None = None
) -> Peer:
    """A peer that trains on examples of one turn."""
    everything = work.one_per_turn(stage.work.conversations(stage.work.rows))
    batch = padded(work.some(everything, stage.turns), stage.device)
    first = padded(work.one_per_turn(stage.work.conversations(stage.work.rows[:1])), stage.device)
    targets = int((batch["labels"] >= 0).sum())
    return Peer(name, lambda: evaluate(loss, first), adam_step(parameters, loss, batch), targets, prompt)


def naive(stage: Stage) -> Peer:
    """Public E2P code's: `inputs_embeds`, an example a turn, a padded batch, logits at every position."""
    model, projector = stage.model, Projector(stage.projector).to(stage.device)

    def loss(batch: Batch) -> torch.Tensor:
        embedded = model.get_input_embeddings()(batch["tokens"][:, 1:])
        soft = projector(batch["vectors"]).to(embedded.dtype)
        embedded = torch.cat([soft[:, None], embedded], dim=1)
        return model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss

    return on_turns("naive torch", stage, loss, list(projector.parameters()))


def prompt_tuning(stage: Stage) -> Peer:
    """PEFT's: one trained token for all users, here at first the embedding of some token; an example a turn."""
    start = stage.model.get_input_embeddings().weight[5].detach()
    tuned = peft.get_peft_model(stage.model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1))
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.copy_(start[None])

    def loss(batch: Batch) -> torch.Tensor:
        return tuned(
            input_ids=batch["tokens"][:, 1:],
            attention_mask=batch["attention_mask"][:, 1:],
            labels=batch["labels"][:, 1:],
        ).loss

    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    return on_turns("PEFT prompt tuning", stage, loss, parameters, start)


def additive_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, T] -> [B, 1, T, T]: the block-diagonal causal mask written out as SDPA wants it."""
    length = segments.shape[1]
    causal = torch.ones(length, length, device=segments.device).tril().bool()
    visible = (segments[:, :, None] == segments[:, None, :]) & causal
    return torch.zeros(visible.shape, dtype=dtype, device=segments.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )[:, None]


def block_mask(segments: torch.Tensor, dtype: torch.dtype) -> flex_attention.BlockMask:
    """The same as FlexAttention wants it: blocks in which nobody sees anybody are skipped."""
    batch, length = segments.shape

    def visible(b: Any, head: Any, query: Any, key: Any) -> Any:
        return (segments[b, query] == segments[b, key]) & (query >= key)

    return flex_attention.create_block_mask(visible, batch, None, length, length, device=str(segments.device))


def on_rows(name: str, stage: Stage, model: Any, mask: Callable[[torch.Tensor, torch.dtype], Any]) -> Peer:
    """A peer that trains on our packed rows: no attention across examples, logits at targets only, compiled."""
    projector = Projector(stage.projector).to(stage.device)

    def on_device(arrays: dict[str, np.ndarray]) -> Batch:
        tensors = {name: torch.tensor(array, device=stage.device) for name, array in arrays.items()}
        return {**tensors, "mask": mask(tensors["segment_ids"], stage.dtype)}

    def loss(batch: Batch) -> torch.Tensor:
        embedded = model.get_input_embeddings()(batch["tokens"].long())
        soft = projector(batch["user_embeddings"]).to(embedded.dtype)
        width = embedded.shape[-1]
        at_slots = soft.gather(1, batch["slots"].clamp_min(0).long()[..., None].expand(-1, -1, width))
        embedded = torch.where(batch["slots"][..., None] >= 0, at_slots, embedded)
        hidden = model.model(
            inputs_embeds=embedded,
            attention_mask=batch["mask"],
            position_ids=batch["positions"].long(),
            use_cache=False,
        ).last_hidden_state
        hidden = hidden.gather(1, batch["target_positions"].long()[..., None].expand(-1, -1, width))
        logits = model.lm_head(hidden).float()
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), batch["target_ids"].long().flatten(), reduction="none")
        weights = batch["target_weights"].flatten()
        return (nll * weights).sum() / weights.sum()

    batch = stage.work.batch
    step = adam_step(list(projector.parameters()), torch.compile(loss, dynamic=False), on_device(batch))
    targets = int(batch["target_weights"].sum())
    return Peer(name, lambda: evaluate(loss, on_device(stage.work.first_row)), step, targets)


def smart(stage: Stage) -> Peer:
    """Our packed rows with scaled dot-product attention."""
    return on_rows("smart torch", stage, stage.model, additive_mask)


def flex(stage: Stage) -> Peer:
    """Our packed rows with FlexAttention, in a second model of the same weights.

    Raises:
      LeftOut: on a CPU.
    """
    if stage.device == "cpu":
        raise LeftOut("FlexAttention has no backward pass on a CPU")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            stage.model.config, dtype=stage.dtype, attn_implementation="flex_attention"
        )
    model.load_state_dict(stage.model.state_dict(), assign=True)
    for module, other in zip(model.modules(), stage.model.modules(), strict=True):
        module._buffers.update(other._buffers)  # frequencies, which no file has
    return on_rows("torch FlexAttention", stage, model.eval().requires_grad_(False), block_mask)
