"""Data, and an encoder's name -> a table of user vectors."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e2p_jax.datasets.interactions.log import INTERACTIONS, load_interactions
from e2p_jax.datasets.prepared import load_table
from e2p_jax.embed.contexts import first_contexts
from e2p_jax.errors import UserError, shown
from e2p_jax.options import EncoderSettings
from e2p_jax.vectors.population import Population, training_population
from e2p_jax.vectors.table import UserTable, save_table

_BLOCK = 1 << 16  # rows
_ROUNDING = 0.1  # of how vectors vary in a dimension, that a shorter dtype may take or add


class Made(NamedTuple):
    """The users of a table that was made: written, and left out."""

    users: int  # who have a vector
    absent: int  # of the data, who have none
    warnings: list[str]  # what training on all of them would refuse or warn of


def make_table(data: str, encoder: str, out: Path, settings: EncoderSettings) -> Made:
    """Writes a table.

    Args:
      data: as `data.path`; with `import`, a table in any form.
      encoder: `backbone`, `als`, `svd`, `item-mean`, `import`, or what sentence-transformers loads.

    Raises:
      UserError: the data, the encoder or a setting is at fault, no user gets a vector, or the dtype cannot hold them.
    """
    users, vectors = _make(data, encoder, settings)
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
    save_table(out, users, vectors, name=encoder, version=digest.hexdigest()[:12])
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


def _make(data: str, encoder: str, settings: EncoderSettings) -> tuple[Sequence[str], np.ndarray]:
    """Ids of all users, and vectors, NaN for users who have none."""
    if encoder == "import":
        table = load_table(data)
        rows = np.setdiff1d(np.arange(table.index.rows), table.index.repeats())
        every = len(rows) == table.index.rows
        return list(table.ids), table.vectors if every else table.vectors[rows]
    if encoder in ("als", "svd"):
        from e2p_jax.embed.collaborative import factor_vectors

        interactions = load_interactions(Path(data))
        return interactions.user_ids, factor_vectors(interactions, encoder, settings.width, settings.seed)
    if encoder == "item-mean" and (Path(data) / INTERACTIONS).is_file():
        from e2p_jax.embed.collaborative import histories

        interactions = load_interactions(Path(data))
        return interactions.user_ids, _item_means(histories(interactions), settings)
    contexts = first_contexts(data)
    if encoder == "item-mean":
        return list(contexts), _item_means(list(contexts.values()), settings)
    texts = [context for context in contexts.values() if context]
    made = _encode(texts, encoder, settings) if texts else np.zeros((0, 1), np.float32)
    vectors = np.full((len(contexts), made.shape[1]), np.nan, np.float32)
    vectors[[bool(context) for context in contexts.values()]] = made
    return list(contexts), vectors


def _encode(texts: Sequence[tuple[str, ...]], encoder: str, settings: EncoderSettings) -> np.ndarray:
    if encoder == "backbone":
        from e2p_jax.backbone.weights import resolve
        from e2p_jax.embed.hidden_states import backbone_vectors

        return backbone_vectors(texts, resolve(settings.backbone, None), settings.layer)
    from e2p_jax.embed.text import text_vectors

    return text_vectors(texts, encoder)


def _item_means(lists: Sequence[Sequence[str]], settings: EncoderSettings) -> np.ndarray:
    from e2p_jax.embed.collaborative import item_means

    if settings.items is None:
        raise UserError("--encoder item-mean: give --items, a table of item vectors")
    return item_means(lists, load_table(settings.items, "null"))
