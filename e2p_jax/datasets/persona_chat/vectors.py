"""The vectors that may lie beside the dialogues, row i for dialogue i, as a table of users."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e2p_jax.datasets.persona_chat.dialogues import Dialogue, user_id
from e2p_jax.errors import UserError
from e2p_jax.vectors.arrays import map_array
from e2p_jax.vectors.table import save_table


def save_vectors(parts: Sequence[tuple[Path, int, Sequence[Dialogue]]], table: Path, name: str, version: str) -> None:
    """Writes one row per user, the mean of its dialogues' rows.

    Args:
      parts: File of vectors, how many dialogues it must have rows for, and those whose users are in the table.
      table: Directory to write.
      name: Of the table.
      version: Of the table.

    Raises:
      UserError: a file is not [dialogues, width] floats, the widths differ, or a row is not finite.
    """
    read = [_read(path, count, dialogues) for path, count, dialogues in parts]
    widths = sorted({vectors.shape[1] for vectors in read})
    if len(widths) > 1:
        names = " and ".join(path.name for path, *_ in parts)
        raise UserError(f"{parts[0][0].parent}: {names} have different widths, {' and '.join(map(str, widths))}")
    ids = [user_id(dialogue.persona) for *_, dialogues in parts for dialogue in dialogues]
    users, rows = np.unique(ids, return_inverse=True)
    sums = np.zeros((len(users), widths[0]), np.float64)
    np.add.at(sums, rows, np.concatenate(read))
    means = sums / np.bincount(rows)[:, None]
    save_table(table, users.tolist(), means.astype(np.float32), name=name, version=version)


def _read(path: Path, count: int, dialogues: Sequence[Dialogue]) -> np.ndarray:
    """[len(dialogues), E] of any float type."""
    vectors: np.ndarray = map_array(path)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise UserError(f"{path}: {vectors.dtype} of shape {vectors.shape}, expected floats [dialogues, width]")
    if len(vectors) != count:
        raise UserError(f"{path}: {len(vectors)} rows for {count} dialogues; row i must belong to dialogue i")
    vectors = vectors[[dialogue.number for dialogue in dialogues]]
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        dialogue = dialogues[bad[0]]
        raise UserError(f"{path}: row {dialogue.number} ({dialogue.source}) holds NaN or infinity; repair it")
    return vectors
