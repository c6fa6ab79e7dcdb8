"""User vectors in other people's files.

`.npz` (arrays `embeddings` and `ids`), `.npy` with its ids beside it (`NAME.ids.txt`), `.parquet` and `.arrow`,
`.feather` or `.ipc` (columns `user_id` and `embedding`, or LanceDB's `id` and `vector`; lists of one length), `.csv`
and `.tsv` (a header; the first column the id, every other one a number of the vector).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e2p_jax.data.user_index import UserIndex
from e2p_jax.errors import UserError

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
        return UserIndex.open(ids), read_arrays(place)
    if place.suffix == ".parquet" or place.suffix in ARROW:
        return _read_columns(place)
    if place.suffix in (".csv", ".tsv"):
        return _read_csv(place)
    raise UserError(
        f"{place}: not a table; give a table directory, .npz, .parquet, {', '.join(ARROW)}, .csv, .tsv, "
        "or .npy with ids beside it"
    )


def read_arrays(path: Path) -> Any:
    """The array of a .npy, as a memory map, or the arrays of a .npz by name. Nothing is ever unpickled."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # NumPy reads a damaged header as Python: whatever that raises
        reason = _first_line(error)
        raise UserError(f"{path}: unreadable ({reason}); save plain arrays of numbers and text, not objects") from error


def _read_npz(place: Path) -> tuple[list[str], np.ndarray]:
    arrays = read_arrays(place)
    if not isinstance(arrays, dict) or not {"embeddings", "ids"} <= arrays.keys():
        raise UserError(f"{place}: needs the arrays `embeddings` and `ids`, has {sorted(arrays)}")
    ids = arrays["ids"]
    if ids.ndim != 1 or ids.dtype.kind not in "USiu":
        raise UserError(f"{place}: ids have shape {ids.shape} and dtype {ids.dtype}; save [users] texts or numbers")
    if ids.dtype.kind == "S":
        try:
            ids = np.char.decode(ids, "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: ids are not UTF-8 text ({error}); save them as text") from error
    return [str(user) for user in ids.tolist()], arrays["embeddings"]


def _read_columns(place: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow
    import pyarrow.compute
    import pyarrow.feather
    import pyarrow.parquet

    kind = "Parquet" if place.suffix == ".parquet" else "Arrow"
    read = pyarrow.parquet.read_table if kind == "Parquet" else pyarrow.feather.read_table
    try:
        table = read(place)
        table.validate(full=True)
        columns = table.column_names
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: unreadable ({_first_line(error)}); give {_article(kind)} file") from error
    names = next((pair for pair in _NAMES if set(pair) <= set(columns)), None)
    if names is None or any(columns.count(name) > 1 for name in names):
        raise UserError(f"{place}: needs the columns `user_id` and `embedding`, has {columns}")
    ids, lists = (table.column(name) for name in names)
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


def _read_csv(place: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow
    import pyarrow.csv

    delimiter = "\t" if place.suffix == ".tsv" else ","
    try:
        with place.open("rb") as file:
            header = file.readline().decode("utf-8-sig").rstrip("\r\n").split(delimiter)
        width = len(header) - 1
        names = ["user_id", *map(str, range(width))]
        types = dict(zip(names, [pyarrow.string(), *[pyarrow.float32()] * width], strict=True))
        table = pyarrow.csv.read_csv(
            place,
            pyarrow.csv.ReadOptions(column_names=names, skip_rows=1, use_threads=False),
            pyarrow.csv.ParseOptions(delimiter=delimiter),
            pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False, null_values=[]),
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: the header is not UTF-8 text; save the file as UTF-8") from error
    except pyarrow.ArrowException as error:
        # Arrow counts rows from 1, the skipped header among them.
        row = re.search(r"Row #(\d+)", str(error))
        where = f"{place}:{row[1]}" if row else str(place)
        reason = re.sub(r"^.*Row #\d+: ", "", _first_line(error))
        raise UserError(f"{where}: {reason}; a line is an id and then {width} numbers, as the header says") from error
    if width < 1:
        raise UserError(f"{place}: its header has one column; the first is the user's id, every other a number")
    vectors = np.stack([table.column(name).to_numpy() for name in names[1:]], axis=1)
    return table.column("user_id").to_pylist(), vectors


def _is_text(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)


def _article(kind: str) -> str:
    return f"an {kind}" if kind == "Arrow" else f"a {kind}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
