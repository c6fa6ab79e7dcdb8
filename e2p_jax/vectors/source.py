"""Vectors that stay where they are until a batch needs them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from e2p_jax.vectors.table import UserTable


@dataclasses.dataclass(frozen=True, eq=False)
class Vectors:
    """N vectors of width E, by where they are. Threads may gather at the same time."""

    source: UserTable | np.ndarray  # a table, or [M, E] float32
    rows: np.ndarray  # [N] int64: of the source; -1 in a table is the null user

    @classmethod
    def of(cls, array: np.ndarray) -> "Vectors":
        """Of [N, E] float32, one a row."""
        return cls(array, np.arange(len(array)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """E."""
        return self.source.shape[1] if isinstance(self.source, np.ndarray) else self.source.width

    def gather(self, places: Sequence[int] | np.ndarray | slice = slice(None)) -> np.ndarray:
        """[n, E] float32: those of some places, or all.

        Raises:
          UserError: naming the user and row whose vector is not finite.
        """
        rows = self.rows[places if isinstance(places, slice) else np.asarray(places, np.int64)]
        return self.source[rows] if isinstance(self.source, np.ndarray) else self.source.gather(rows)
