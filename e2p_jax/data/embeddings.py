"""Tables of user vectors, keyed by user id.

A table is a directory: `embeddings.npy` [N, E] float16 or float32, `ids.txt` (one id a line, in row order) and
`meta.json` (`name`, `version`, `width`, `dtype`). Files are imported on the fly: `.npz` (arrays `embeddings` and
`ids`), `.parquet` (columns `user_id` and `embedding`), `.npy` with its ids beside it (`NAME.ids.txt`).
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e2p_jax.data import synthetic
from e2p_jax.errors import UserError
from e2p_jax.files import replace_directory


class UserTable:
    """User id -> vector. The vectors stay where they are: a memory map when read from a directory."""

    def __init__(self, ids: Sequence[str], vectors: np.ndarray, source: str):
        """
        Args:
          ids: N texts.
          vectors: [N, E], floating point.
          source: for errors, where they come from.

        Raises:
          UserError: counts differ, the array is not [N, E] numbers, or an id stands twice with different vectors.
        """
        if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
            raise UserError(
                f"{source}: vectors have shape {vectors.shape} and dtype {vectors.dtype}; "
                "save them as [users, width] in float16 or float32"
            )
        if len(ids) != len(vectors):
            raise UserError(f"{source}: {len(ids)} ids for {len(vectors)} vectors; they must match row by row")
        self.vectors, self.source = vectors, source
        self._rows: dict[str, int] = {}
        for row, user in enumerate(ids):
            first = self._rows.setdefault(user, row)
            if first != row and not np.allclose(vectors[first], vectors[row], atol=1e-3):
                raise UserError(f"{source}: user {user!r} has different vectors in rows {first} and {row}; keep one")

    @property
    def width(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def ids(self) -> list[str]:
        return list(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def lookup(self, users: Sequence[str], where: Sequence[str]) -> np.ndarray:
        """[N, E] float32.

        Args:
          users: N user ids.
          where: for errors, the record that each stands in.

        Raises:
          UserError: naming the user and row whose vector is missing or not finite.
        """
        for user, place in zip(users, where, strict=True):
            if user not in self._rows:
                raise UserError(f"{place}: user {user!r} has no vector in {self.source}; add it or drop the record")
        rows = [self._rows[user] for user in users]
        vectors = np.asarray(self.vectors[rows], np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            user, row = users[int(bad[0])], rows[int(bad[0])]
            raise UserError(f"{self.source}: row {row} (user {user!r}) holds NaN or infinity; repair or drop it")
        return vectors


def load_table(path: str) -> UserTable:
    """Opens a table, or any importable file; `synthetic` is the generated users'.

    Raises:
      UserError: unknown form, missing parts, wrong shapes.
    """
    if path == "synthetic":
        users = [*synthetic.TRAIN, *synthetic.VALIDATION]
        return UserTable([f"user-{u}" for u in users], np.stack([synthetic.vector(u) for u in users]), path)
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_directory(place)
    if not place.is_file():
        raise UserError(f"data.embeddings: {place} does not exist")
    if place.suffix == ".npz":
        arrays = _read_arrays(place)
        if not isinstance(arrays, dict) or not {"embeddings", "ids"} <= arrays.keys():
            raise UserError(f"{place}: needs the arrays `embeddings` and `ids`, has {sorted(arrays)}")
        return UserTable([str(i) for i in arrays["ids"]], arrays["embeddings"], str(place))
    if place.suffix == ".parquet":
        return _read_parquet(place)
    if place.suffix == ".npy":
        ids = place.with_suffix(".ids.txt")
        if not ids.is_file():
            raise UserError(f"{place}: needs the user ids beside it, one a line in row order, in {ids.name}")
        return UserTable(_read_ids(ids), _read_arrays(place), str(place))
    raise UserError(f"{place}: not a table; give a table directory, .npz, .parquet, or .npy with ids beside it")


def save_table(path: Path, ids: Sequence[str], vectors: np.ndarray, *, name: str, version: str) -> None:
    """Writes a table directory.

    Raises:
      UserError: what `UserTable` refuses, or an id that does not fit on a line of `ids.txt`.
    """
    UserTable(ids, vectors, str(path))
    if broken := [user for user in ids if not user or "\n" in user or "\r" in user]:
        raise UserError(f"{path}: user id {broken[0]!r} is empty or holds a line break; rename that user")
    meta = {"name": name, "version": version, "width": int(vectors.shape[1]), "dtype": vectors.dtype.name}
    with replace_directory(path) as temporary:
        np.save(temporary / "embeddings.npy", vectors, allow_pickle=False)
        (temporary / "ids.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _read_directory(place: Path) -> UserTable:
    missing = [name for name in ("embeddings.npy", "ids.txt", "meta.json") if not (place / name).is_file()]
    if missing:
        raise UserError(f"{place}: not a table of user vectors; missing {', '.join(missing)}")
    vectors = _read_arrays(place / "embeddings.npy")
    try:
        width = json.loads((place / "meta.json").read_text(encoding="utf-8"))["width"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{place / 'meta.json'}: must be a JSON object with a width ({error!r})") from error
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise UserError(f"{place}: embeddings.npy has shape {vectors.shape}, but meta.json says width {width}")
    return UserTable(_read_ids(place / "ids.txt"), vectors, str(place))


def _read_arrays(path: Path) -> Any:
    """The array of a .npy, as a memory map, or the arrays of a .npz by name. Nothing is ever unpickled."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: unreadable ({error}); save plain arrays of numbers and text, not objects") from error


def _read_ids(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save the ids as UTF-8") from error


def _read_parquet(place: Path) -> UserTable:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(place)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{place}: unreadable ({error}); give a Parquet file") from error
    if not {"user_id", "embedding"} <= set(table.column_names):
        raise UserError(f"{place}: needs the columns `user_id` and `embedding`, has {table.column_names}")
    ids, lists = table.column("user_id"), table.column("embedding")
    if ids.null_count or lists.null_count:
        raise UserError(f"{place}: a user_id or embedding is null; drop that row")
    try:
        widths = pyarrow.compute.unique(pyarrow.compute.list_value_length(lists)).to_pylist()
        numbers = pyarrow.compute.list_flatten(lists).cast(pyarrow.float32()).to_numpy()
    except pyarrow.ArrowException as error:
        raise UserError(f"{place}: the column `embedding` has type {lists.type}; make it lists of numbers") from error
    if len(widths) != 1:
        raise UserError(f"{place}: vectors have different widths {sorted(widths)}; give all users the same")
    return UserTable([str(i) for i in ids.to_pylist()], numbers.reshape(-1, widths[0]), str(place))
