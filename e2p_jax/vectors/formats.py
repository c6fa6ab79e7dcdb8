"""User vectors in other people's files.

`.npz` (arrays `embeddings` and `ids`), `.npy` with its ids beside it (`NAME.ids.txt`), `.parquet` and `.arrow`,
`.feather` or `.ipc` (columns `user_id` and `embedding`, or LanceDB's `id` and `vector`; lists of one length), `.csv`
and `.tsv` (`csv_table.py`). No more of a file is read than is asked for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e2p_jax.errors import UserError
from e2p_jax.text_files import shortened
from e2p_jax.vectors.arrays import first_line, map_array, read_members, refuse_inflation
from e2p_jax.vectors.csv_table import read_csv
from e2p_jax.vectors.index import UserIndex

ARROW = (".arrow", ".feather", ".ipc")
_NAMES = (("user_id", "embedding"), ("id", "vector"))  # ours, LanceDB's


def read_file(place: Path) -> tuple[Sequence[str] | UserIndex, np.ndarray]:
    """Ids and vectors of any file that holds user vectors.

    Returns:
      N ids, or an index over them, and the vectors as they are stored; [N, E] if the file is right.

    Raises:
      UserError: unknown form, unreadable, or parts missing; with the row where it is a row's fault.
    """
    if place.suffix == ".npz":
        return _read_npz(place)
    if place.suffix == ".npy":
        ids = place.with_suffix(".ids.txt")
        if not ids.is_file():
            raise UserError(f"{place}: needs the user ids beside it, one a line in row order, in {ids.name}")
        return UserIndex.open(ids), map_array(place)
    if place.suffix == ".parquet" or place.suffix in ARROW:
        return _read_columns(place)
    if place.suffix in (".csv", ".tsv"):
        return read_csv(place)
    raise UserError(
        f"{place}: not a table; give a table directory, .npz, .parquet, {', '.join(ARROW)}, .csv, .tsv, "
        "or .npy with ids beside it"
    )


def _read_npz(place: Path) -> tuple[list[str], np.ndarray]:
    arrays = read_members(place, ["embeddings", "ids"])
    ids = arrays["ids"]
    if ids.ndim != 1 or ids.dtype.kind not in "USiu":
        raise UserError(f"{place}: ids have shape {ids.shape} and dtype {ids.dtype}; save [users] texts or numbers")
    if ids.dtype.kind == "S":
        try:
            ids = np.char.decode(ids, "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: ids are not UTF-8 text ({error}); save them as text") from error
    try:
        return [str(user) for user in ids.tolist()], arrays["embeddings"]
    except ValueError as error:  # beyond Unicode's last character
        raise UserError(f"{place}: ids are not text ({first_line(error)}); save them as text") from error


def _read_columns(place: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow
    import pyarrow.compute

    read = _read_parquet if place.suffix == ".parquet" else _read_arrow
    try:
        table = read(place)
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "a Parquet" if place.suffix == ".parquet" else "an Arrow"
        raise UserError(f"{place}: unreadable ({first_line(error)}); give {kind} file") from error
    names = _columns(place, table.column_names)
    ids, lists = (table.column(name) for name in names)
    if pyarrow.types.is_dictionary(ids.type):  # pandas' categories
        ids = ids.cast(ids.type.value_type)
    for name, column in zip(names, (ids, lists), strict=True):
        if column.null_count:
            row = pyarrow.compute.index(column.is_null(), True).as_py()
            raise UserError(f"{place}: row {row}: {name} is null; drop that row")
    if not (pyarrow.types.is_integer(ids.type) or _is_text(ids.type)):
        raise UserError(f"{place}: the column `{names[0]}` has type {ids.type}; make it text")
    try:
        users = [str(user) for user in ids.to_pylist()]
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: the column `{names[0]}` is not UTF-8 text; save it as UTF-8") from error
    try:
        widths = pyarrow.compute.list_value_length(lists).to_numpy()
        numbers = pyarrow.compute.list_flatten(lists)
        half = numbers.type == pyarrow.float16()
        vectors = (numbers if half else numbers.cast(pyarrow.float32(), safe=False)).to_numpy()
    except pyarrow.ArrowException as error:
        raise UserError(f"{place}: the column `{names[1]}` has type {lists.type}; make it lists of numbers") from error
    width = int(widths[0]) if len(widths) else 0
    if len(other := np.flatnonzero(widths != width)):
        every = sorted(set(widths.tolist()))
        raise UserError(f"{place}: row {other[0]}: vectors have different widths {every}; give all users the same")
    return users, vectors.reshape(len(users), width)


def _read_parquet(place: Path) -> Any:
    import pyarrow.parquet

    with place.open("rb") as source:
        file = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
        names = _columns(place, file.schema_arrow.names)
        for first in file.iter_batches(1, columns=list(names)):  # the metadata of columns ends the process if damaged
            size = first.nbytes * file.metadata.num_rows
            refuse_inflation(place, f"`{names[1]}`", size, place.stat().st_size)
            break
        return file.read(columns=list(names))


def _read_arrow(place: Path) -> Any:
    import pyarrow

    with pyarrow.OSFile(str(place)) as source:
        schema = pyarrow.ipc.open_file(source).schema
        asked = [schema.get_field_index(name) for name in _columns(place, schema.names)]
        return pyarrow.ipc.open_file(source, options=pyarrow.ipc.IpcReadOptions(included_fields=asked)).read_all()


def _columns(place: Path, columns: Sequence[str]) -> tuple[str, str]:
    """The names of the ids' and the vectors' column."""
    names = next((pair for pair in _NAMES if set(pair) <= set(columns)), None)
    if names is None or any(columns.count(name) > 1 for name in names):
        raise UserError(
            f"{place}: needs the columns `user_id` and `embedding`, has {shortened(columns)}; write each once"
        )
    return names


def _is_text(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
