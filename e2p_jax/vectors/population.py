"""Describes the training users' vectors: the statistics that standardise them, and whether they tell users apart.

Worked out in float64 over blocks of the table, whose rows are never in memory all at once. Multiplying a table by a
number changes no standardised vector.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from e2p_jax.errors import UserError, shown
from e2p_jax.vectors.table import UserTable

_BLOCK = 1 << 24  # bytes of float32 that are gathered at once
_CONSTANT = 1e-6  # of a dimension's mean: what float32 rounds away is no difference between users
_DEAD = 1e-20  # of the widest dimension's spread: MiniLM has dimensions near 1e-33, beside 0.05 in the others
_RANGE = (1e-30, 1e30)  # in which float32 holds a mean, a spread and the quotient of the two with room to spare
_SAMPLE = 1 << 11  # users by whom the spread of all but the outermost is judged
_OUTERMOST = 0.01  # of the sample, on either side of a dimension
_ENOUGH = 10  # users, below which nobody is an outlier
_SWAMPED = 100  # times the spread of the others is too much


class Population(NamedTuple):
    """Statistics of the training users' vectors."""

    mean: np.ndarray  # [E] float32
    std: np.ndarray  # [E] float32, greater than 0

    @classmethod
    def of(cls, vectors: np.ndarray) -> "Population":
        """Of [N, E] vectors, one per user, N at least 1."""
        size = max(_BLOCK // (4 * vectors.shape[1]), 1)
        return Moments.of(vectors[first : first + size] for first in range(0, len(vectors), size)).population()

    @classmethod
    def standard(cls, width: int) -> "Population":
        """Changes no vector: where the projector's own statistics are read afterwards, or nobody has a vector."""
        return cls(np.zeros(width, np.float32), np.ones(width, np.float32))


class Moments(NamedTuple):
    """Count, mean and spread of users' vectors."""

    users: int
    mean: np.ndarray  # [E] float64
    std: np.ndarray  # [E] float64

    @classmethod
    def of(cls, blocks: Iterable[np.ndarray]) -> "Moments":
        """Of blocks of [n, E] vectors, by Chan, Golub and LeVeque's pairwise update (1979)."""
        users, mean, squares = 0, np.zeros(1), np.zeros(1)
        for block in blocks:
            values = block.astype(np.float64)
            center = values.mean(axis=0)
            share = len(values) / (users + len(values))
            squares = squares + ((values - center) ** 2).sum(axis=0) + (center - mean) ** 2 * users * share
            mean = mean + (center - mean) * share
            users += len(values)
        return cls(users, mean, np.sqrt(squares / users))

    @property
    def varies(self) -> np.ndarray:
        """[E] bool: whether users differ in a dimension by more than rounding, and by something beside the others."""
        return self.std > np.maximum(_CONSTANT * np.abs(self.mean), _DEAD * self.std.max())

    def population(self) -> Population:
        """Divides a dimension that never varies by its own size, or by the others' spread if that is greater: a
        user who differs there, when one comes, is not blown up, and the scale of a table stays without a say.
        """
        varies, size = self.varies, np.abs(self.mean)
        others = np.sqrt(np.mean(self.std[varies] ** 2)) if varies.any() else np.sqrt(np.mean(size**2)) or 1.0
        std = np.where(varies, self.std, np.maximum(size, others))
        with np.errstate(over="ignore"):
            return Population(self.mean.astype(np.float32), std.astype(np.float32))


def training_population(table: UserTable, rows: np.ndarray, *, told_apart: bool) -> tuple[Population, list[str]]:
    """The statistics of the users who are trained on.

    Args:
      rows: [N] int64 rows of `table`, each once.
      told_apart: whether the vectors are to tell users apart: not where all get the same one.

    Returns:
      The statistics, and what to warn of.

    Raises:
      UserError: a vector is not finite; float32 cannot hold the statistics; or the vectors tell no user from another,
        because several users all have the same one, or because next to some, who are named, the others do not differ.
    """
    rows = np.sort(rows)
    moments = Moments.of(blocks(table, rows))
    population = moments.population()
    _refuse_range(table, population)
    if not told_apart or len(rows) < 2:  # with one user there is nobody to be told from
        return population, []
    if not moments.varies.any():
        raise UserError(
            f"{table.source}: all {len(rows)} training users have the same vector, so there is nothing to learn from "
            "it; give a table whose vectors differ"
        )
    return population, _outliers(table, rows, moments)


def blocks(table: UserTable, rows: np.ndarray) -> Iterator[np.ndarray]:
    """[n, E] float32 each: the vectors of rows, so many at once as hardly take memory."""
    size = max(_BLOCK // (4 * table.width), 1)
    for first in range(0, len(rows), size):
        yield table.gather(rows[first : first + size])


def _refuse_range(table: UserTable, population: Population) -> None:
    for what, values in (("vary by", population.std), ("have a mean of", np.abs(population.mean))):
        lowest = _RANGE[0] if what == "vary by" else 0.0
        if len(wrong := np.flatnonzero((values < lowest) | (values > _RANGE[1]))):
            raise UserError(
                f"{table.source}: in dimension {wrong[0]} the training users' vectors {what} {values[wrong[0]]:.1e}, "
                f"which float32 cannot standardise ({_RANGE[0]:.0e} to {_RANGE[1]:.0e} can be); multiply the table by "
                "a number that brings them near 1"
            )


def _outliers(table: UserTable, rows: np.ndarray, moments: Moments) -> list[str]:
    """Warns where a few users' numbers are so large that the others' are nearly one and the same."""
    if len(rows) < _ENOUGH:
        return []
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(np.int64)]
    values = np.sort(table.gather(sample), axis=0)
    cut = max(int(len(values) * _OUTERMOST), min(3, len(values) // 4))
    inner = Moments.of([values[cut:-cut]])
    swamped = moments.varies & inner.varies & (moments.std > _SWAMPED * inner.std)
    if not swamped.any():
        return []
    far = [np.zeros(0, np.int64)]
    size = max(_BLOCK // (4 * table.width), 1)
    for number, block in enumerate(blocks(table, rows)):
        distance = np.abs(block[:, swamped] - inner.mean[swamped])
        far.append(number * size + np.flatnonzero((distance > _SWAMPED * inner.std[swamped]).any(axis=1)))
    users = rows[np.concatenate(far)]
    named = ", ".join(shown(table.index.ids([row])[0]) for row in users[:3].tolist())
    message = (
        f"{table.source}: in {swamped.sum()} of {table.width} dimensions the numbers of {len(users)} of {len(rows)} "
        f"training users ({named}{', ..' if len(users) > 3 else ''}) are so large that the others hardly differ beside "
        "them; repair or drop these users, or take the logarithm of such dimensions"
    )
    if 2 * swamped.sum() > moments.varies.sum():
        raise UserError(message)
    return [message]
