"""Examples in columns: one array of all tokens instead of objects, so that millions fit, in memory or on disk."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from e2p_jax.data.encode import Example

_ARRAYS = ("tokens", "is_target", "ends", "slot_starts")


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """N examples of L tokens together; an `Example` is a view, made when it is asked for."""

    tokens: np.ndarray  # [L] int32
    is_target: np.ndarray  # [L] bool
    ends: np.ndarray  # [N] int64: where each ends
    slot_starts: np.ndarray  # [N] int32
    users: Sequence[str]  # N

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """Reads them one by one: they need not be there all at once."""
        tokens, is_target = bytearray(), bytearray()
        ends: list[int] = []
        slot_starts: list[int] = []
        users: list[str] = []
        for example in examples:
            tokens += example.tokens.astype(np.int32).tobytes()
            is_target += example.is_target.tobytes()
            ends.append(len(is_target))
            slot_starts.append(example.slot_start)
            users.append(example.user_id)
        return cls(
            np.frombuffer(tokens, np.int32),
            np.frombuffer(is_target, bool),
            np.array(ends, np.int64),
            np.array(slot_starts, np.int32),
            users,
        )

    def save(self, directory: Path) -> None:
        """Writes the arrays, one a file, without the users."""
        for name in _ARRAYS:
            np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, directory: Path, users: Sequence[str]) -> "Examples":
        """Maps what `save` wrote."""
        maps = {name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return cls(**{name: array.view(np.ndarray) for name, array in maps.items()}, users=users)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        first, last = (int(self.ends[number - 1]) if number else 0), int(self.ends[number])
        start = int(self.slot_starts[number])
        return Example(self.tokens[first:last], self.is_target[first:last], start, self.users[number])

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: tokens of each."""
        return np.diff(self.ends, prepend=0)

    @property
    def target_counts(self) -> np.ndarray:
        """[N] int64: targets of each."""
        before = np.concatenate([[0], np.cumsum(self.is_target, dtype=np.int64)])
        return np.diff(before[self.ends], prepend=0)
