"""What runs beside us: someone else's training step on our work, and what must be equal before it is timed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from work import Work


@dataclasses.dataclass(frozen=True)
class Stage:
    """What every contender is given."""

    work: Work
    directory: Path  # of the backbone, as Hugging Face has it
    model: Any  # the same backbone in transformers, frozen
    projector: dict[str, Any]  # values of our projector, [..] arrays by name
    turns: int  # examples a batch, of those who train on an example a turn
    device: str
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Peer:
    """A contender: its loss on the conversations of the first row, and its step on its own batch."""

    name: str
    nats: Callable[[], float]  # per target
    step: Callable[[], Any]  # returns the loss; `float` of it waits until the step is done
    targets: float  # of a step
    prompt: torch.Tensor | None = None  # [D], where all users have this soft token


class LeftOut(Exception):
    """A peer that cannot run here; the message says why."""
