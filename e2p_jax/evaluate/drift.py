"""Two versions of a table of user vectors: does the projector that was trained on the old one serve the new one?"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from e2p_jax.config import Condition
from e2p_jax.data.conditions import user_vectors
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate.measures import Difference, Interval, difference, share_of
from e2p_jax.train.run import Run
from e2p_jax.train.score import Scorer
from e2p_jax.vectors.table import UserTable

Case = tuple[str, Condition]
FITTED = 4000  # users of both tables at most, beside the split's, that a linear map is fitted to
RIDGE = 1e-4  # of a dimension's variance: where users are hardly more than dimensions noise would decide all
ALIGNED = 0.8  # cosine after the map from which the new space is the old one, mapped, if it gained 0.2 at least


@dataclasses.dataclass(frozen=True)
class Drift:
    """A split's users in two tables, compared."""

    users: int  # in both tables
    missing: int  # of the split, in one of the tables or both
    cosine: float  # mean over users, of standardised vectors, old to new
    aligned_cosine: float  # the same, less the mean, after the linear map that fits best, fitted to others than it maps
    token_change: float  # root mean square change of a soft token, in units of how users' tokens differ
    nll_change: Difference  # new minus old, nats per target
    gain_old: Interval  # nats per target that the own vector is better than another user's, old table
    gain_new: Interval
    kept: Interval | None  # gain_new / gain_old; none where the gain to keep is not told from zero
    retrain: bool | None  # none where the data does not tell

    def verdict(self) -> str:
        """One sentence."""
        if self.kept is None:
            value, low, high = (f"{number:+.4f}" for number in self.gain_old)
            return (
                f"no verdict: with the old table a user's own vector is worth {value} [{low}, {high}] nats per target, "
                "not told from nothing; take more users, or a checkpoint that uses them"
            )
        share, low, high = (f"{100 * number:.0f} %" for number in self.kept)
        left = f"{share} [{low}, {high}] of what a user's own vector is worth is left"
        if self.retrain is None:
            return f"no verdict: {left}; take more users"
        if not self.retrain:
            return f"keep the projector: {left}"
        mapped = self.aligned_cosine > max(ALIGNED, self.cosine + 0.2)
        hint = "; the new space is mostly a linear map of the old one, so aligning the new table would do as well"
        return f"retrain the projector: {left}{hint if mapped else ''}"


def drift(run: Run, records: Sequence[Record], old: UserTable, new: UserTable, keep: float = 0.9) -> Drift:
    """Compares two tables in front of one run.

    What is left of the gain of the own vector over another user's is a ratio, whose interval is a percentile bootstrap
    over users. Retraining is advised where all of it is below `keep`, keeping where all of it is at or above. There is
    no verdict in between, nor where the old table's gain is not told from zero: a ratio to it says nothing.

    Args:
      run: trained on the old table.
      records: of users in both tables; others are left out.
      old: opened with `missing="null"`, as is `new`.
      keep: share of the gain.

    Raises:
      UserError: widths that differ, fewer than two users in both tables, or a run that was trained on no vectors.
    """
    width, condition = run.model.embedding_width, run.own_condition()
    for table in (old, new):
        if table.width != width:
            raise UserError(f"{table.source}: vectors have width {table.width}, but the run's projector takes {width}")
    users, where = [record.user_id for record in records], [record.source for record in records]
    there = (old.rows(users, where) >= 0) & (new.rows(users, where) >= 0)
    kept = [record for record, known in zip(records, there, strict=True) if known]
    names = sorted({record.user_id for record in kept})
    if len(names) < 2:
        raise UserError(f"{new.source} and {old.source} have {len(names)} users of the split in common; 2 are needed")
    before, after = (table.lookup(names, names) for table in (old, new))
    mean, std = (part.astype(np.float64) for part in run.population)  # products of large new vectors are not in float32
    everybody = names + _others(names, old, new)
    a, b = ((table.lookup(everybody, everybody) - mean) / std for table in (old, new))
    projector = run.model.merged.projector
    soft_old, soft_new = (np.asarray(projector(vectors)) for vectors in (before, after))
    spread = np.sqrt(np.mean((soft_old - soft_old.mean(axis=0)) ** 2))

    statistics = _statistics(run, kept, condition, {"old": old, "new": new})
    owners, samples = [record.user_id for record in kept], run.inputs.config.evaluate.bootstrap_samples
    change = difference("nll_per_target", statistics["new", "e2p"], statistics["old", "e2p"], owners, samples)
    new_pair, old_pair = ((statistics[version, "e2p"], statistics[version, "shuffled"]) for version in ("new", "old"))
    gain_new, gain_old, share = share_of(new_pair, old_pair, owners, samples)
    retrain = None
    if share is not None:
        retrain = True if share.high < keep else False if share.low >= keep else None
    return Drift(
        users=len(names),
        missing=len(set(users)) - len(names),
        cosine=_cosine(a[: len(names)], b[: len(names)]),
        aligned_cosine=aligned_cosine(a, b, len(names)),
        token_change=float(np.sqrt(np.mean((soft_new - soft_old) ** 2)) / spread),
        nll_change=change,
        gain_old=gain_old,
        gain_new=gain_new,
        kept=share,
        retrain=retrain,
    )


def _others(names: Sequence[str], old: UserTable, new: UserTable) -> list[str]:
    """Users of both tables that are not among these, evenly spaced in the new one."""
    rows = np.unique(np.linspace(0, len(new) - 1, FITTED).astype(np.int64))
    others = sorted(set(new.index.ids(rows)) - set(names))
    known = old.rows(others, others) >= 0
    return [user for user, there in zip(others, known, strict=True) if there]


def aligned_cosine(a: np.ndarray, b: np.ndarray, count: int) -> float:
    """Tells how near a linear map of one table's vectors comes to another's.

    A rotation would be too little: one of the vectors as they stand in a table is none of standardised vectors, whose
    dimensions are scaled each by itself. Each half of the rows is mapped by what fits the other half best (ridge
    regression, less the means): fewer users than dimensions can be mapped to anything.

    Args:
      a: [N, E] float64, old, standardised.
      b: [N, E] float64, new, of the same users; the scale of a dimension does not matter.
      count: how many rows from the first are judged.

    Returns:
      The mean cosine to the old vectors less their mean.
    """
    b = b / np.maximum(b.std(axis=0), 1e-12)
    old, mapped = np.empty_like(a), np.empty_like(a)
    for half in range(2):
        x, y = b[1 - half :: 2], a[1 - half :: 2]
        x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
        products = (x - x_mean).T @ (x - x_mean) + RIDGE * len(x) * np.eye(x.shape[1])
        fitted = np.linalg.solve(products, (x - x_mean).T @ (y - y_mean))
        old[half::2], mapped[half::2] = a[half::2] - y_mean, (b[half::2] - x_mean) @ fitted
    return _cosine(old[:count], mapped[:count])


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.sum(a * b, axis=1) / np.maximum(norms, 1e-12)))


def _statistics(
    run: Run, records: Sequence[Record], condition: Condition, tables: dict[str, UserTable]
) -> dict[Case, np.ndarray]:
    """NLL and targets of every record, [N, 2], with its own and another user's vector of each table; its context stands
    in front as text where it did in training.
    """
    examples = [run.inputs.encoder.fit(record, [condition]).examples[condition] for record in records]
    targets = np.array([int(example.is_target.sum()) for example in examples])
    whose: tuple[Condition, ...] = ("e2p", "shuffled")
    groups = {
        (name, vector): (examples, user_vectors(records, vector, table, run.population))
        for name, table in tables.items()
        for vector in whose
    }
    nll = Scorer(run).nll(groups)
    return {case: np.stack([values, targets], axis=1) for case, values in nll.items()}
