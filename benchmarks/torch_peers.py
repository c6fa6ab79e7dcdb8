"""The same training step in PyTorch: as public code has it, as well as its libraries allow, and PEFT's.

Each peer trains what we train, on the examples that we train on, and gives the loss that we give.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft
import torch
from torch import nn

from e2p_jax.data.encode import Example

Batch = dict[str, torch.Tensor]


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


def one_per_turn(examples: Sequence[Example]) -> list[Example]:
    """An example for each assistant turn: all before it as its prompt."""
    turns = []
    for example in examples:
        starts = np.flatnonzero(np.diff(example.is_target.astype(np.int8), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(example.is_target.astype(np.int8), append=0) == -1) + 1
        for start, end in zip(starts, ends, strict=True):
            is_target = np.arange(end) >= start
            turns.append(Example(example.tokens[:end], is_target, example.slot_start, example.user_id))
    return turns


def padded(examples: Sequence[Example], vectors: Sequence[np.ndarray], device: str) -> Batch:
    """A batch as long as its longest example; labels are -100 but at targets. The slot stands first."""
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


def adam_step(parameters: Sequence[nn.Parameter], loss: Callable[[Batch], torch.Tensor]) -> Callable[[Batch], float]:
    """A step of AdamW on mean loss, with the clip that we have; returns the loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return value.item()

    return step


def naive_loss(model: Any, projector: Projector) -> Callable[[Batch], torch.Tensor]:
    """Public E2P code's: `inputs_embeds`, an example a turn, a padded batch, logits at every position."""

    def loss(batch: Batch) -> torch.Tensor:
        embedded = model.get_input_embeddings()(batch["tokens"][:, 1:])
        soft = projector(batch["vectors"]).to(embedded.dtype)
        embedded = torch.cat([soft[:, None], embedded], dim=1)
        return model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss

    return loss


def packed(batch: dict[str, np.ndarray], dtype: torch.dtype, device: str) -> Batch:
    """Our packed rows, with the block-diagonal causal mask written out as SDPA wants it."""
    length = batch["tokens"].shape[1]
    tensors = {name: torch.tensor(array, device=device) for name, array in batch.items()}
    segments = tensors["segment_ids"]
    mask = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, device=device).tril().bool()
    least = torch.finfo(dtype).min
    tensors["mask"] = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, least)[:, None]
    return tensors


def smart_loss(model: Any, projector: Projector, compiled: bool) -> Callable[[Batch], torch.Tensor]:
    """Packed rows, no attention across examples, logits at targets only, compiled."""

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

    return torch.compile(loss, dynamic=False) if compiled else loss


def prompt_tuning(model: Any, start: torch.Tensor) -> tuple[Any, Callable[[Batch], torch.Tensor]]:
    """PEFT's model with one virtual token that begins as `start` [D], and its loss: one prompt for all users."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.copy_(start[None])

    def loss(batch: Batch) -> torch.Tensor:
        return tuned(
            input_ids=batch["tokens"][:, 1:],
            attention_mask=batch["attention_mask"][:, 1:],
            labels=batch["labels"][:, 1:],
        ).loss

    return tuned, loss
