"""Puts in front of a conversation what a condition says: a vector for the slots, and perhaps the context as text.

A run is what was trained (`data.condition` and `train.trainable`); a condition is only what stands in front, in
training or in evaluation. So `static` and `mean` are the same front: the former is a run trained on it (prompt
tuning), the latter asks a run trained on `e2p` what its token is worth without a user.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from e2p_jax.config import Condition
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.vectors.index import distinct
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.source import Vectors
from e2p_jax.vectors.table import UserTable


class Front(NamedTuple):
    """The front of a conversation under a condition."""

    vector: Literal["own", "other", "mean", "zero", "noise", "extreme"] | None  # None: no slots
    context: Literal["own", "other"] | None  # in the system message

    @property
    def reads_table(self) -> bool:
        """Whether what stands in the slots was some user's vector."""
        return self.vector in ("own", "other", "extreme")

    @property
    def is_shuffled(self) -> bool:
        """Whether another user stands in front: who, a derangement says (`other_users`)."""
        return "other" in self


FRONTS: dict[Condition, Front] = {
    "none": Front(None, None),
    "e2p": Front("own", None),
    "text": Front(None, "own"),
    "e2p+text": Front("own", "own"),
    "static": Front("mean", None),
    "shuffled": Front("other", None),
    "text+shuffled": Front(None, "other"),
    "mean": Front("mean", None),
    "zero": Front("zero", None),
    "noise": Front("noise", None),
    "extreme": Front("extreme", None),
}
EXTREME = 1000.0  # times the user's vector


def user_vectors(
    records: Sequence[Record],
    condition: Condition,
    table: UserTable | None,
    population: Population,
    draw: int = 0,
) -> Vectors:
    """Of every record, as `vectors_of` has it."""
    users, where = [record.user_id for record in records], [record.source for record in records]
    return vectors_of(users, where, condition, table, population, draw)


def vectors_of(
    users: Sequence[str],
    where: Sequence[str],
    condition: Condition,
    table: UserTable | None,
    population: Population,
    draw: int = 0,
) -> Vectors:
    """One per user: where it is in the table, or in a small array for what is not a user's own.

    `shuffled` gives every user another user's, and leaves the null user what it is; `noise` draws one per user from a
    normal distribution with the training users' mean and spread; `extreme` is the user's own times `EXTREME`.

    Args:
      users: N user ids.
      where: for errors, the record that each stands in.
      draw: number of the derangement, of those users who have a vector.

    Raises:
      UserError: a user without a vector, or with one that is not finite.
    """
    kind = FRONTS[condition].vector
    if FRONTS[condition].reads_table:
        if table is None:
            raise UserError(f"data.embeddings is not set; condition {condition!r} needs a table of user vectors")
        rows = table.rows(users, where)
        if kind == "other":
            known = np.flatnonzero(rows >= 0)
            rows[known] = table.rows(other_users([users[n] for n in known.tolist()], draw), where)
        table.check(distinct(rows))
        if kind == "extreme":
            held, row = np.unique(rows, return_inverse=True)
            return Vectors(table.gather(held) * np.float32(EXTREME), row)
        return Vectors(table, rows)
    if kind == "noise":
        names, row = np.unique(np.asarray(users[:], str), return_inverse=True)
        size = len(names), len(population.mean)
        drawn = np.random.default_rng([0, 2]).normal(population.mean, population.std, size)
        return Vectors(drawn.astype(np.float32), row)
    vector = population.mean if kind == "mean" else np.zeros_like(population.mean)
    return Vectors(vector[None], np.zeros(len(users), np.int64))


def other_users(users: Sequence[str], draw: int = 0) -> list[str]:
    """For every user one further around a random circle: never oneself, and every user as often as a user.

    Each `draw` goes one further than the one before, so that with U users nobody meets anybody twice in U - 1 of them.

    Raises:
      UserError: there is one user alone.
    """
    circle = sorted(set(users))
    if len(circle) < 2:
        raise UserError(
            "conditions 'shuffled' and 'text+shuffled' need at least two users to draw another from, 'shuffled' some "
            f"who have a vector, and the split has {len(circle)}; leave them out (--conditions none e2p; `e2p train`: "
            "--evaluate.conditions)"
        )
    order = np.random.default_rng([0, 1]).permutation(len(circle))
    others = np.roll(order, -1 - draw % (len(circle) - 1))
    following = {circle[a]: circle[b] for a, b in zip(order, others, strict=True)}
    return [following[user] for user in users]


def draws(condition: Condition, users: Iterable[str], most: int) -> int:
    """How many derangements a condition is the mean of: `most`, or all there are; one where there are none to draw."""
    return max(min(most, len(set(users)) - 1), 1) if FRONTS[condition].is_shuffled else 1


def spelled_out(records: Iterable[Record], condition: Condition, draw: int = 0) -> Iterable[Record]:
    """The records with the context that a condition spells out.

    For `text+shuffled` it is another user's, of the one whose vector `shuffled` gives in the same draw where all have
    one: for a user's first record that of the other's first, and so on, around if there are fewer.

    Raises:
      UserError: there is one user alone.
    """
    if FRONTS[condition].context != "other":
        return records
    records, contexts = list(records), collections.defaultdict(list)
    for record in records:
        contexts[record.user_id].append(record.context)
    met: collections.Counter[str] = collections.Counter()
    out = []
    for record, other in zip(records, other_users([record.user_id for record in records], draw), strict=True):
        theirs = contexts[other]
        out.append(dataclasses.replace(record, context=theirs[met[record.user_id] % len(theirs)]))
        met[record.user_id] += 1
    return out
