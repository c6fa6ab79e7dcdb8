"""Ranks the same candidates without a language model: by popularity, item-kNN, the vectors alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e2p_jax.datasets.interactions.log import INTERACTIONS, Interactions, load_interactions
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.rank import ranks
from e2p_jax.vectors.table import UserTable

KNOWN = ("history", "train")  # what a run has seen of a user when it is asked


def is_interactions(path: str) -> bool:
    """Tells whether `data.path` is what `e2p prepare interactions` wrote."""
    return (Path(path).expanduser() / INTERACTIONS).is_file()


def recommender_ranks(path: str, records: Sequence[Record], table: UserTable | None) -> dict[str, np.ndarray]:
    """[N] rank of each record's true candidate, the first one, by name of the recommender.

    popularity: how many users have the item. item-kNN: cosines of the item's users to those of each of the user's
    items, summed (Sarwar et al., 2001). vectors: cosine of the user's vector to the mean vector of the item's users,
    all less the mean of all; absent without a table.

    Args:
      path: a directory that `e2p prepare interactions` wrote.
      records: whose candidates are titles of its items.
      table: of the users' vectors.
    """
    known = load_interactions(Path(path).expanduser()).of(*KNOWN)
    number = {title: item for item, title in enumerate(known.titles)}
    asked = [[number[title] for title in record.candidates] for record in records]
    users = [record.user_id for record in records]
    popularity = np.bincount(known.items, minlength=len(known.titles)).astype(float)
    scores = {"popularity": [popularity[items] for items in asked], "item-kNN": neighbour_scores(known, users, asked)}
    if table is not None:
        scores["vectors"] = _dot_products(known, users, asked, table)
    widest = max(map(len, asked))
    return {
        name: ranks(np.stack([np.pad(-row, (0, widest - len(row)), constant_values=np.nan) for row in rows]))
        for name, rows in scores.items()
    }


def neighbour_scores(known: Interactions, users: Sequence[str], asked: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Item-kNN: for each user, the score of each of the items that are asked for."""
    import scipy.sparse

    shape = (len(known.user_ids), len(known.titles))
    ones = np.ones(len(known))
    has = scipy.sparse.csr_matrix((ones, (known.users, known.items)), shape).sign()
    norm = np.sqrt(np.maximum(has.sum(axis=0), 1)).A1
    unit = (has @ scipy.sparse.diags(1 / norm)).tocsc()  # columns of length 1
    row = {user: place for place, user in enumerate(known.user_ids)}
    out = []
    for user, items in zip(users, asked, strict=True):
        mine = unit @ has[row[user]].T  # [users, 1]: the sum of the columns of the user's items
        out.append((unit[:, items].T @ mine).toarray()[:, 0])
    return out


def _dot_products(
    known: Interactions, users: Sequence[str], asked: Sequence[Sequence[int]], table: UserTable
) -> list[np.ndarray]:
    vectors = table.lookup(known.user_ids, known.user_ids).astype(np.float64)
    there = ~np.isnan(vectors[:, 0])
    vectors = np.where(there[:, None], vectors - vectors[there].mean(axis=0), 0.0)
    sums = np.zeros((len(known.titles), vectors.shape[1]))
    np.add.at(sums, known.items, vectors[known.users])
    items = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    row = {user: place for place, user in enumerate(known.user_ids)}
    return [items[candidates] @ vectors[row[user]] for user, candidates in zip(users, asked, strict=True)]
