"""Puts in front of a conversation what a condition says: a vector for the slots, and perhaps the context as text.

A run is what was trained (`data.condition` and `train.trainable`); a condition is only what stands in front, in
training or in evaluation. So `static` and `mean` are the same front: the former is a run trained on it (prompt
tuning), the latter asks a run trained on `e2p` what its token is worth without a user.
"""

from collections.abc import Sequence
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

    vector: Literal["own", "other", "mean", "zero", "noise"] | None  # None: no slots
    context: bool  # the record's context, in the system message


FRONTS: dict[Condition, Front] = {
    "none": Front(None, False),
    "e2p": Front("own", False),
    "text": Front(None, True),
    "e2p+text": Front("own", True),
    "static": Front("mean", False),
    "shuffled": Front("other", False),
    "mean": Front("mean", False),
    "zero": Front("zero", False),
    "noise": Front("noise", False),
}


def user_vectors(
    records: Sequence[Record],
    condition: Condition,
    table: UserTable | None,
    population: Population,
    seed: int = 0,
) -> Vectors:
    """Of every record, as `vectors_of` has it."""
    users, where = [record.user_id for record in records], [record.source for record in records]
    return vectors_of(users, where, condition, table, population, seed)


def vectors_of(
    users: Sequence[str],
    where: Sequence[str],
    condition: Condition,
    table: UserTable | None,
    population: Population,
    seed: int = 0,
) -> Vectors:
    """One per user: where it is in the table, or in a small array for what is not a user's own.

    `shuffled` gives every user another user's, and leaves the null user what it is; `noise` draws one per user from a
    normal distribution with the training users' mean and spread.

    Args:
      users: N user ids.
      where: for errors, the record that each stands in.

    Raises:
      UserError: a user without a vector, or with one that is not finite.
    """
    kind = FRONTS[condition].vector
    if kind in ("own", "other"):
        if table is None:
            raise UserError(f"data.embeddings is not set; condition {condition!r} needs a table of user vectors")
        rows = table.rows(users, where)
        if kind == "other":
            known = np.flatnonzero(rows >= 0)
            rows[known] = table.rows(other_users([users[n] for n in known.tolist()], seed), where)
        table.check(distinct(rows))
        return Vectors(table, rows)
    if kind == "noise":
        names, row = np.unique(np.asarray(users[:], str), return_inverse=True)
        size = len(names), len(population.mean)
        drawn = np.random.default_rng([seed, 2]).normal(population.mean, population.std, size)
        return Vectors(drawn.astype(np.float32), row)
    vector = population.mean if kind == "mean" else np.zeros_like(population.mean)
    return Vectors(vector[None], np.zeros(len(users), np.int64))


def other_users(users: Sequence[str], seed: int) -> list[str]:
    """For every user the next one around a random circle: never oneself, and every user as often as a user."""
    circle = sorted(set(users))
    if len(circle) < 2:
        raise UserError("condition 'shuffled' needs at least two users in the split")
    order = np.random.default_rng([seed, 1]).permutation(len(circle))
    following = {circle[a]: circle[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
    return [following[user] for user in users]
