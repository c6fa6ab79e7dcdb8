"""Reads what users' vectors are made of, out of any data."""

from collections.abc import Callable, Sequence

import numpy as np

from e2p_jax.datasets.prepared import load_records, split_names
from e2p_jax.vectors.table import check_ids


def first_contexts(path: str) -> dict[str, tuple[str, ...]]:
    """Each user's context as their first record has it: one that comes later may tell what an earlier one asks for.

    Splits are read in the order the data has them, `train` first.

    Args:
      path: as `data.path`.

    Returns:
      User id -> the context's texts that are not blank.

    Raises:
      UserError: no such data, or a record is malformed.
    """
    found: dict[str, tuple[str, ...]] = {}
    for split in sorted(split_names(path), key=lambda name: name != "train"):
        for record in load_records(path, split):
            found.setdefault(record.user_id, tuple(text for text in record.context if text.strip()))
    return found


def in_blocks(context: tuple[str, ...], blocks: int) -> list[tuple[str, ...]]:
    """K parts of a context: text number t goes to part t mod K; where there are fewer texts, they come again."""
    return [context[block % len(context) :: blocks] for block in range(blocks)]


def vectors_of_contexts(
    data: str, encode: Callable[[Sequence[tuple[str, ...]]], np.ndarray], blocks: int = 1
) -> tuple[Sequence[str], np.ndarray]:
    """What an encoder of texts makes: ids of all users, and vectors [U, K*E] float32, NaN for users without a context.

    Args:
      encode: N contexts of one text or more -> [N, E] float32.
      blocks: K.

    Raises:
      UserError: before anything is encoded, an id that no table can hold.
    """
    contexts = first_contexts(data)
    check_ids(contexts, data)
    texts = [context for context in contexts.values() if context]
    parts = [part for context in texts for part in in_blocks(context, blocks)]
    made = encode(parts).reshape(len(texts), -1) if texts else np.zeros((0, 1), np.float32)
    vectors = np.full((len(contexts), made.shape[1]), np.nan, np.float32)
    vectors[[bool(context) for context in contexts.values()]] = made
    return list(contexts), vectors
