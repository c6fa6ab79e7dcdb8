"""User vectors from who consumed what. Only a user's history is read: nothing that a record of any split asks for."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from e2p_jax.datasets.interactions.log import INTERACTIONS, Interactions, load_interactions, part_id
from e2p_jax.datasets.prepared import load_table
from e2p_jax.embed.contexts import first_contexts
from e2p_jax.errors import UserError


def factors(
    data: str, encoder: str, width: int, seed: int
) -> tuple[Sequence[str], np.ndarray, Sequence[str], np.ndarray]:
    """Factorises the users' histories, weights w as 1 + log(1 + w).

    Args:
      data: directory of a prepared dataset of interactions.
      encoder: als: implicit-feedback alternating least squares (Hu, Koren and Volinsky, 2008), by the package
        `implicit`; svd: truncated singular value decomposition, by SciPy; a user's vector is the row of U times the
        singular values.

    Returns:
      U user ids, [U, width] float32, the ids of the I items that a history has, and [I, width] float32: a user's
      vector times an item's is the entry that the two come to. Where histories are dealt into parts, there is each user
      without each part, too, folded in: the items' factors stay what they are.

    Raises:
      UserError: `implicit` is not installed, or the width is beyond what so many users and items have.
    """
    import scipy.sparse

    interactions = load_interactions(Path(data))
    history = interactions.of("history")
    # Items that only a held-out interaction has must not even be counted.
    items, columns = np.unique(np.array(interactions.item_ids)[history.items], return_inverse=True)
    weights = 1 + np.log1p(history.weights)
    shape = (len(interactions.user_ids), len(items))
    if width >= min(shape):
        raise UserError(f"--width {width}: must be below {min(shape)}, the number of users and of items; lower it")
    matrix = scipy.sparse.csr_matrix((weights, (history.users, columns)), shape)
    # The users as they are, and without each part of their history.
    folds = np.zeros(len(history), np.int8) if history.folds is None else history.folds
    parts = [] if history.folds is None else range(int(np.max(folds)) + 1)
    less = [
        scipy.sparse.csr_matrix((weights[kept], (history.users[kept], columns[kept])), shape)
        for kept in (folds != part for part in parts)
    ]
    factorise = {"als": _als, "svd": _svd}[encoder]
    of_users, of_items = factorise(matrix, less, width, seed)
    names = [*interactions.user_ids, *(part_id(user, part) for part in parts for user in interactions.user_ids)]
    return names, np.concatenate(of_users), items.tolist(), of_items


Factors = tuple[list[np.ndarray], np.ndarray]  # of the users of every matrix, and of the items


def _als(matrix, less, width: int, seed: int) -> Factors:  # type: ignore[no-untyped-def]  # SciPy has no types
    try:
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise UserError("--encoder als: needs the package implicit; pip install 'e2p-jax[embed]'") from error
    # One thread: sums in one order, the same bytes every time.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the threads that it was just denied
        model = AlternatingLeastSquares(factors=width, random_state=seed, num_threads=1)
        model.fit(matrix, show_progress=False)
        users = [model.user_factors, *(model.recalculate_user(np.arange(part.shape[0]), part) for part in less)]
    return [np.asarray(each, np.float32) for each in users], np.asarray(model.item_factors, np.float32)


def _svd(matrix, less, width: int, seed: int) -> Factors:  # type: ignore[no-untyped-def]
    from scipy.sparse.linalg import svds

    start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
    left, values, right = svds(matrix.astype(np.float64), k=width, v0=start)
    order = np.argsort(-values)
    left, values, right = left[:, order], values[order], right[order].T
    largest = left[np.abs(left).argmax(axis=0), np.arange(width)]
    sign = np.sign(largest)  # a direction's sign is anybody's choice
    users = [left * sign * values, *(part @ (right * sign) for part in less)]
    return [each.astype(np.float32) for each in users], (right * sign).astype(np.float32)


def item_means(data: str, items: str | None) -> tuple[Sequence[str], np.ndarray]:
    """U user ids, and [U, E] float32: means of the vectors of the items in a user's history or, where the data is not
    of interactions, context; items without a vector do not count, NaN where no item has one.

    Args:
      items: table of vectors by item id.

    Raises:
      UserError: no table is given.
    """
    if items is None:
        raise UserError("--encoder item-mean: give --items, a table of item vectors")
    lists: Mapping[str, Sequence[str]]
    has_log = (Path(data) / INTERACTIONS).is_file()
    lists = _histories(load_interactions(Path(data))) if has_log else first_contexts(data)
    table = load_table(items, "null")
    every = list(dict.fromkeys(item for mine in lists.values() for item in mine))
    vectors = table.lookup(every, ["--items"] * len(every))
    place = {item: row for row, item in enumerate(every)}
    means = np.full((len(lists), table.width), np.nan, np.float32)
    for number, mine in enumerate(lists.values()):
        known = vectors[[place[item] for item in mine]]
        known = known[~np.isnan(known[:, 0])]
        if len(known):
            means[number] = known.mean(axis=0, dtype=np.float64)
    return list(lists), means


def _histories(interactions: Interactions) -> Mapping[str, Sequence[str]]:
    """The item ids of each user's history."""
    history = interactions.of("history")
    mine: list[list[str]] = [[] for _ in interactions.user_ids]
    for user, item in zip(history.users.tolist(), history.items.tolist(), strict=True):
        mine[user].append(interactions.item_ids[item])
    return dict(zip(interactions.user_ids, mine, strict=True))
