"""A tensor that is worked out from what the files hold when it is read, some rows at a time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

_CHUNK_BYTES = 1 << 24  # of what is worked out at once


class Lazy:
    """What numpy asks of a tensor that is only read: shape, dtype, slices, and the whole."""

    def __init__(self, shape: tuple[int, ...], rows: Callable[[int, int], np.ndarray]):
        """
        Args:
          shape: of the tensor.
          rows: (first, last) -> these along axis 0, float32.
        """
        self.shape, self.dtype, self._rows = shape, np.dtype(np.float32), rows

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> "Lazy":
        """Some of the tensor's rows, a slice without a step; nothing is worked out yet."""
        first, last, _ = rows.indices(self.shape[0])
        return Lazy((last - first, *self.shape[1:]), lambda a, b: self._rows(first + a, first + b))

    def each(self, change: Callable[[np.ndarray], np.ndarray], *shape: int) -> "Lazy":
        """The tensor [N, *shape] that `change` makes of any of its rows, [n, ...] -> [n, *shape]."""
        return Lazy((self.shape[0], *shape), lambda a, b: change(self._rows(a, b)))

    def astype(self, dtype: Any) -> np.ndarray:
        """The whole tensor; of the worked-out values only a few rows stand there in float32."""
        out = np.empty(self.shape, dtype)
        self.read(out, (slice(None),) * self.ndim)
        return out

    def read(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills `out`, in its dtype, with a part of the tensor: slices without steps."""
        first, last, _ = index[0].indices(self.shape[0])
        step = max(1, _CHUNK_BYTES // max(1, self.nbytes // max(1, self.shape[0])))
        for start in range(first, last, step):
            end = min(start + step, last)
            out[start - first : end - first] = self._rows(start, end)[(slice(None), *index[1:])]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.astype(self.dtype if dtype is None else dtype)
