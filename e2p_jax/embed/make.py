"""Data, and an encoder's name -> a table of user vectors."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e2p_jax.datasets.prepared import load_table
from e2p_jax.errors import UserError, shown
from e2p_jax.files import refuse_other_files
from e2p_jax.options import EncoderSettings
from e2p_jax.registry import ENCODERS, TEXT_ENCODER
from e2p_jax.vectors.population import Population, training_population
from e2p_jax.vectors.table import FILES, UserTable, save_table

_BLOCK = 1 << 16  # rows
_ROUNDING = 0.1  # of how vectors vary in a dimension, that a shorter dtype may take or add


class Made(NamedTuple):
    """The users of a table that was made: written, and left out."""

    users: int  # who have a vector
    absent: int  # of the data, who have none
    warnings: list[str]  # what training on all of them would refuse or warn of


def make_table(data: str, encoder: str, out: Path, settings: EncoderSettings) -> Made:
    """Writes a table; of factors the items' too, beside it, by the same name with `-items` behind.

    Args:
      data: as `data.path`; with `import`, a table in any form.
      encoder: one of `registry.ENCODERS`, or what sentence-transformers loads.

    Raises:
      UserError: `out` holds something else, the data, the encoder or a setting is at fault, no user gets a vector, or
        the dtype cannot hold them.
    """
    refuse_other_files(out, FILES.__contains__)
    chosen = ENCODERS.get(encoder, TEXT_ENCODER)
    flags = chosen.of(dataclasses.asdict(settings) | {"encoder": encoder})
    users, vectors, *items = chosen.load()(data, **flags)
    known = ~np.isnan(vectors[:, 0]) | (encoder == "import")
    if not known.all():
        users = [user for user, has_vector in zip(users, known, strict=True) if has_vector]
        vectors = vectors[known]
    if not users:
        raise UserError(f"{data}: no user gets a vector from --encoder {encoder}; nothing is written")
    exact = vectors
    if settings.dtype != "auto":
        with np.errstate(over="ignore"):  # what the dtype cannot hold is named below
            vectors = exact.astype(settings.dtype)
    for first in range(0, len(vectors), _BLOCK):
        if len(bad := np.flatnonzero(~np.isfinite(vectors[first : first + _BLOCK]).all(axis=1))):
            row = first + int(bad[0])
            raise UserError(
                f"{data}: row {row} (user {shown(users[row])}): the vector is not finite in {vectors.dtype}"
            )
    if vectors.dtype.itemsize < exact.dtype.itemsize:
        _refuse_rounding(data, exact, vectors)
    digest = hashlib.sha256("\n".join(users).encode("utf-8", "surrogatepass"))
    digest.update(np.ascontiguousarray(vectors).data)
    notes = {"ignored_keys": keys} if (keys := flags.get("ignored_keys")) else {}
    if items:
        ids, factors = items
        factors = factors if settings.dtype == "auto" else factors.astype(settings.dtype)
        place = Path(f"{out}-items")
        save_table(place, ids, factors, name=f"{encoder}-items", version=digest.hexdigest()[:12])
    save_table(out, users, vectors, name=encoder, version=digest.hexdigest()[:12], **notes)
    return Made(len(users), len(known) - len(users), _warnings(users, vectors, str(out)))


def _refuse_rounding(data: str, exact: np.ndarray, rounded: np.ndarray) -> None:
    before, after = Population.of(exact).std, Population.of(rounded).std
    lost = np.flatnonzero(~(np.abs(after - before) <= _ROUNDING * before))
    if 2 * len(lost) > len(before):
        raise UserError(
            f"{data}: in {len(lost)} of {len(before)} dimensions {rounded.dtype} rounds away how vectors differ (by "
            f"{before[lost[0]]:.1e} in dimension {lost[0]}); use --dtype float32, or bring them near 1"
        )


def _warnings(users: Sequence[str], vectors: np.ndarray, source: str) -> list[str]:
    try:
        return training_population(UserTable(users, vectors, source), np.arange(len(users)), told_apart=True)[1]
    except UserError as error:  # it may be trained on in part
        return [str(error)]


def imported(data: str) -> tuple[Sequence[str], np.ndarray]:
    """The vectors that are in a file, as they are."""
    table = load_table(data)
    rows = np.setdiff1d(np.arange(table.index.rows), table.index.repeats())
    every = len(rows) == table.index.rows
    return list(table.ids), table.vectors if every else table.vectors[rows]
