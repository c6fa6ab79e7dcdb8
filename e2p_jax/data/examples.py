"""Examples in columns: one array of all tokens instead of objects, so that millions fit, in memory or on disk."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from e2p_jax.data.columns import Column, Texts, encode, span
from e2p_jax.data.encode import Example

_COLUMNS: dict[str, Any] = {
    "tokens": np.int32,
    "is_target": bool,
    "ends": np.int64,
    "slot_starts": np.int32,
    "slot_ends": np.int64,
    "target_counts": np.int64,
    "user_text": np.uint8,
    "user_ends": np.int64,
    "source_text": np.uint8,
    "source_ends": np.int64,
    "items": np.int32,
    "item_ends": np.int64,
    "item_slots": np.int32,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """N examples of L tokens together; an `Example` is a view, made when it is asked for."""

    tokens: np.ndarray  # [L] int32
    is_target: np.ndarray  # [L] bool
    ends: np.ndarray  # [N] int64: where each ends
    slot_starts: np.ndarray  # [G] int32, of all together
    slot_ends: np.ndarray  # [N] int64
    target_counts: np.ndarray  # [N] int64: targets of each
    user_text: np.ndarray  # [bytes] uint8, as are the sources'
    user_ends: np.ndarray  # [N] int64
    source_text: np.ndarray
    source_ends: np.ndarray
    items: np.ndarray  # [J] int32, rows of the catalogue, of all together
    item_ends: np.ndarray  # [N] int64
    item_slots: np.ndarray  # [N] int32

    @classmethod
    def of(cls, examples: Iterable[Example], directory: Path | None = None) -> "Examples":
        """Reads them one by one: they need not be there all at once.

        Args:
          directory: for files without a name that hold them; in memory without one.
        """
        columns = {name: Column(dtype, directory) for name, dtype in _COLUMNS.items()}
        ends = dict.fromkeys(("ends", "slot_ends", "user_ends", "source_ends", "item_ends"), 0)
        for example in examples:
            user, source = encode(example.user_id), encode(example.source)
            values: dict[str, Any] = {"tokens": example.tokens, "slot_starts": example.slot_starts}
            values |= {"user_text": user, "source_text": source, "items": example.items}
            for end, (name, value) in zip(ends, values.items(), strict=True):
                columns[name].add(value)
                ends[end] += len(value)
                columns[end].add(ends[end])
            columns["is_target"].add(example.is_target)
            columns["target_counts"].add(example.is_target.sum())
            columns["item_slots"].add(example.item_slot)
        return cls(**{name: column.array() for name, column in columns.items()})

    def save(self, directory: Path) -> None:
        """Writes the arrays, one a file."""
        for name in _COLUMNS:
            np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, directory: Path) -> "Examples":
        """Maps what `save` wrote."""
        return cls(**{name: map_column(directory, name) for name in _COLUMNS})

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return self.segment(place)._replace(user_id=self.users[place], source=self.sources[place])

    def segment(self, place: int) -> Example:
        """One without its texts, which a row does not need."""
        first, last = span(self.ends, place)
        starts = self.slot_starts[slice(*span(self.slot_ends, place))].tolist()
        items = self.items[slice(*span(self.item_ends, place))]
        tokens, is_target, item_slot = self.tokens[first:last], self.is_target[first:last], int(self.item_slots[place])
        return Example(tokens, is_target, tuple(starts), "", "", items, item_slot)

    @property
    def users(self) -> Texts:
        """N user ids."""
        return Texts(self.user_text, self.user_ends)

    @property
    def sources(self) -> Texts:
        """N places that they come from, for errors."""
        return Texts(self.source_text, self.source_ends)

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: tokens of each."""
        return np.diff(self.ends, prepend=0)

    @property
    def item_counts(self) -> np.ndarray:
        """[N] int64: items of each."""
        return np.diff(self.item_ends, prepend=0)


def map_column(directory: Path, name: str) -> np.ndarray:
    """The array of a file that NumPy wrote, read as it is asked for."""
    return np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
