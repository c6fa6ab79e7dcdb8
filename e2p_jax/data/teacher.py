"""What a teacher expects at every target: the likeliest tokens, on disk, and the shares of the loss that they get."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from e2p_jax.data.columns import span
from e2p_jax.data.examples import Examples, map_column

# Where there is none (macOS), a disk that fills up is found while writing.
_allot = getattr(os, "posix_fallocate", lambda file, start, size: os.ftruncate(file, start + size))


class Reading(NamedTuple):
    """N examples as a teacher reads them: the targets of the student's, or none where there is no teacher."""

    examples: Examples
    own: int  # the first of them are whose they are; all behind are borrowed by another user


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """Of N examples, some of which have no teacher; L targets together have one."""

    ids: np.ndarray  # [L, k] int32, the likeliest tokens
    log_probs: np.ndarray  # [L, k] float16
    ends: np.ndarray  # [N] int64: where each example's end
    own: int  # as `Reading` has it
    weight: float  # the share of the loss that all tokens of the vocabulary would have together

    @classmethod
    def empty(cls, directory: Path, reading: Reading, tokens: int, weight: float) -> "Teacher":
        """One of k tokens to be written to, in files without a name."""
        ends = np.cumsum(reading.examples.target_counts)

        def file(dtype: Any) -> np.ndarray:
            with tempfile.TemporaryFile(dir=directory) as file:
                shape = int(ends[-1]), tokens
                _allot(file.fileno(), 0, np.dtype(dtype).itemsize * shape[0] * shape[1])
                return np.memmap(file, dtype, "r+", shape=shape).view(np.ndarray)

        return cls(file(np.int32), file(np.float16), ends, reading.own, weight)

    def save(self, directory: Path) -> None:
        for name in ("ids", "log_probs"):
            np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, directory: Path, reading: Reading, weight: float) -> "Teacher":
        """Maps what `save` wrote."""
        ids, log_probs = (map_column(directory, name) for name in ("ids", "log_probs"))
        return cls(ids, log_probs, np.cumsum(reading.examples.target_counts), reading.own, weight)

    def shares(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """[m, k] int32 tokens and [m, k] float32 shares of the loss at an example's m targets; without a teacher m = 0.

        What these tokens leave of the teacher's probability is the true token's, beside its own share. Where that token
        is another user's it has nothing, and these have all.
        """
        first, last = span(self.ends, number)
        shares = np.exp(self.log_probs[first:last].astype(np.float32))
        shares *= np.float32(self.weight) if number < self.own else 1 / shares.sum(axis=-1, keepdims=True)
        return self.ids[first:last], shares
