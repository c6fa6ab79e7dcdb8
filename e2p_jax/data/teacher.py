"""What a teacher expects at every target: the likeliest tokens, on disk, and the shares of the loss that they get."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from e2p_jax.data.columns import span
from e2p_jax.data.examples import map_column


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """Of N examples, some of which have no teacher; L targets together have one."""

    ids: np.ndarray  # [L, k] int32, the likeliest tokens
    log_probs: np.ndarray  # [L, k] float16
    ends: np.ndarray  # [N] int64: where each example's end
    weight: float  # the share of the loss that all tokens of the vocabulary would have together

    @classmethod
    def empty(cls, directory: Path, counts: np.ndarray, tokens: int, weight: float) -> "Teacher":
        """One to be written to, in files without a name.

        Args:
          counts: [N] int64, targets that have a teacher.
          tokens: k.
        """
        ends = np.cumsum(counts)

        def file(dtype: Any) -> np.ndarray:
            with tempfile.TemporaryFile(dir=directory) as file:
                shape = int(ends[-1]), tokens
                os.posix_fallocate(file.fileno(), 0, np.dtype(dtype).itemsize * shape[0] * shape[1])
                return np.memmap(file, dtype, "r+", shape=shape).view(np.ndarray)

        return cls(file(np.int32), file(np.float16), ends, weight)

    def save(self, directory: Path) -> None:
        for name in ("ids", "log_probs"):
            np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, directory: Path, counts: np.ndarray, weight: float) -> "Teacher":
        """Maps what `save` wrote."""
        return cls(map_column(directory, "ids"), map_column(directory, "log_probs"), np.cumsum(counts), weight)

    def shares(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """[m, k] int32 tokens and [m, k] float32 shares of the loss at an example's m targets; without a teacher m = 0.

        What these tokens leave of the teacher's probability is the true token's, beside its own share.
        """
        first, last = span(self.ends, number)
        shares = np.float32(self.weight) * np.exp(self.log_probs[first:last].astype(np.float32))
        return self.ids[first:last], shares
