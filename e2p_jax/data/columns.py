"""Columns of values of any lengths, one after the other in one array: as it is made, in memory or mapped from disk."""

import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

_BLOCK = 1 << 16  # bytes that are written at once


class Column:
    """Grows value by value: in memory, or in a file without a name that is gone with the last array made of it."""

    def __init__(self, dtype: Any, directory: Path | None):
        """
        Args:
          dtype: of every value.
          directory: where the file is.
        """
        self._dtype = np.dtype(dtype)
        self._file: Any = io.BytesIO()
        if directory is not None:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=_BLOCK)  # noqa: SIM115

    def add(self, values: Any) -> None:
        """A number, or an array of them."""
        self._file.write(np.asarray(values, self._dtype).tobytes())

    def array(self) -> np.ndarray:
        """[n], of all that was added; nothing is added afterwards."""
        if isinstance(self._file, io.BytesIO):
            return np.frombuffer(self._file.getbuffer(), self._dtype)
        with self._file as file:
            file.flush()
            return np.memmap(file, self._dtype, "r").view(np.ndarray) if file.tell() else np.zeros(0, self._dtype)


class Ragged:
    """N arrays, views of one that holds them all."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        """
        Args:
          values: [L], of all of them.
          ends: [N] int64, where each ends.
        """
        self.values, self.ends = values, ends

    @classmethod
    def of(cls, parts: Sequence[Sequence[int]]) -> "Ragged":
        """Of whole numbers."""
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.array([number for part in parts for number in part], np.int64), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> np.ndarray:
        first, last = span(self.ends, place)
        return self.values[first:last]


class Texts(Sequence[str]):
    """N texts, decoded as they are asked for."""

    def __init__(self, encoded: np.ndarray, ends: np.ndarray):
        """
        Args:
          encoded: [bytes] uint8, UTF-8.
          ends: [N] int64, where each ends.
        """
        self._encoded = Ragged(encoded, ends)

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return self._encoded[place].tobytes().decode("utf-8", "surrogatepass")


def encode(text: str) -> np.ndarray:
    """[bytes] uint8, for `Texts`."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


def span(ends: np.ndarray, place: int) -> tuple[int, int]:
    """Where one begins and ends.

    Raises:
      IndexError: there is none of this number.
    """
    number = range(len(ends))[place]
    return int(ends[number - 1]) if number else 0, int(ends[number])
