"""What is trained on: conversations, encoded and packed once, which every contender reads."""

import dataclasses

import numpy as np

from e2p_jax.data.encode import Example
from e2p_jax.data.pipeline import PackedDataset, pack
from e2p_jax.datasets.prepared import load_records
from e2p_jax.train import setup
from e2p_jax.vectors.source import Vectors

WIDTH = 384  # of the user vectors

Conversations = tuple[list[Example], list[np.ndarray]]  # and the vectors of their users


@dataclasses.dataclass(frozen=True)
class Work:
    """Packed conversations, of which one batch is timed; losses are compared on its first row."""

    dataset: PackedDataset
    rows: list[int]

    @property
    def batch(self) -> dict[str, np.ndarray]:
        return self.dataset.batch(self.rows)

    @property
    def first_row(self) -> dict[str, np.ndarray]:
        return self.dataset.batch(self.rows[:1])

    def conversations(self, rows: list[int]) -> Conversations:
        """Those in some rows."""
        numbers = [number for row in rows for number in self.dataset.rows[row]]
        return [self.dataset.examples[n] for n in numbers], list(self.dataset.vectors.gather(numbers))


def read_work(inputs: setup.Inputs, path: str, rows: int) -> Work:
    """Enough conversations for several batches; the batch is rows drawn at random, as plans begin with the longest."""
    records = load_records(path, "train")
    examples = [inputs.encoder.fit(record, ["e2p"]).examples["e2p"] for record in records[: 60 * rows]]
    vectors = np.random.default_rng(0).normal(size=(len(examples), WIDTH)).astype(np.float32)
    dataset = pack(examples, Vectors.of(vectors), inputs.encoder)
    return Work(dataset, np.random.default_rng(2).permutation(len(dataset.rows))[:rows].tolist())


def one_per_turn(conversations: Conversations) -> Conversations:
    """An example for each assistant turn: all before it as its prompt."""
    turns, owners = [], []
    for example, vector in zip(*conversations, strict=True):
        starts = np.flatnonzero(np.diff(example.is_target.astype(np.int8), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(example.is_target.astype(np.int8), append=0) == -1) + 1
        for start, end in zip(starts, ends, strict=True):
            is_target = np.arange(end) >= start
            slots = tuple(place for place in example.slot_starts if place < end)
            turns.append(Example(example.tokens[:end], is_target, slots, example.user_id))
            owners.append(vector)
    return turns, owners


def some(conversations: Conversations, count: int) -> Conversations:
    """So many of them, drawn at random."""
    examples, vectors = conversations
    chosen = np.random.default_rng(1).permutation(len(examples))[:count]
    return [examples[n] for n in chosen], [vectors[n] for n in chosen]
