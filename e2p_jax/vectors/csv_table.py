"""User vectors in CSV and TSV files: which column is the id, and whether the first line names the columns.

A header names the id's column (`user_id`, `user` or `id`, wherever it stands; else the first one) and the numbers'.
Where a file can be read in two ways it is refused: a table read in the wrong one gives users others' vectors.
"""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e2p_jax.errors import UserError
from e2p_jax.text_files import LONGEST
from e2p_jax.vectors.arrays import first_line

_IDS = ("user_id", "user", "id")
_REMEDY = "give it a header that names the id's column user_id and the numbers 0, 1, 2, .., and drop other columns"
_NUMBERED = re.compile(r"(.*?)([0-9]+)")


class _Layout(NamedTuple):
    has_header: bool
    users: int  # column of the ids
    counters: list[int]  # columns without a name, as pandas writes a frame's index; left out
    is_named: bool  # whether the header has a name for the ids


def read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    """N ids and [N, E] float32.

    Raises:
      UserError: naming the row or column at fault, or what could be read in two ways.
    """
    import pyarrow
    import pyarrow.csv

    delimiter = "\t" if path.suffix == ".tsv" else ","
    cells = _first_cells(path, delimiter)
    layout = _layout(cells, path)
    names = [str(column) for column in range(len(cells))]
    texts = {layout.users, *layout.counters}
    kinds = [pyarrow.string() if column in texts else pyarrow.float32() for column in range(len(cells))]
    try:
        table = pyarrow.csv.read_csv(
            path,
            pyarrow.csv.ReadOptions(column_names=names, skip_rows=int(layout.has_header), use_threads=False),
            pyarrow.csv.ParseOptions(delimiter=delimiter),
            pyarrow.csv.ConvertOptions(
                column_types=dict(zip(names, kinds, strict=True)), strings_can_be_null=False, null_values=[]
            ),
        )
    except pyarrow.ArrowException as error:
        # Arrow counts rows from 1, a skipped header among them.
        row = re.search(r"Row #(\d+)", str(error))
        where = f"{path}:{row[1]}" if row else str(path)
        reason = re.sub(r"^.*Row #\d+: ", "", first_line(error))
        numbers = len(cells) - len(texts)
        raise UserError(f"{where}: {reason}; a line is an id and {numbers} numbers, as the first line says") from error
    users = table.column(layout.users).to_pylist()
    for column in layout.counters:
        if not _are_whole(table.column(column).to_pylist()):
            raise UserError(f"{path}: column {column + 1} has no name and does not count rows; {_REMEDY}")
    if not layout.is_named and (_are_whole(users) if layout.has_header else _count(users)):
        raise UserError(
            f"{path}: its first column counts, and nothing says that it is the ids and not a frame's index; "
            f"write the frame with index=False, or {_REMEDY}"
        )
    columns = [column for column in range(len(cells)) if column not in texts]
    vectors = np.stack([table.column(column).to_numpy() for column in columns], axis=1)
    return users, vectors


def _first_cells(path: Path, delimiter: str) -> list[str]:
    with path.open("rb") as file:
        line = file.readline(LONGEST)
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}:1: not a line of a table ({first_line(error)}); save the file as UTF-8") from error


def _layout(cells: Sequence[str], path: Path) -> _Layout:
    names = [cell.strip().lower() for cell in cells]
    if len(names) < 2:
        raise UserError(
            f"{path}: its first line has one column; one is the user's id, every other a number, between "
            f"{'tabs' if path.suffix == '.tsv' else 'commas'}"
        )
    named = [column for column, name in enumerate(names) if name in _IDS]
    if len(named) > 1:
        raise _ambiguous(path, f"its header names {' and '.join(names[column] for column in named)}")
    counters: list[int] = []
    for column, name in enumerate(names):
        if name not in ("", "index") and not name.startswith("unnamed:"):
            break
        counters.append(column)
    users = named[0] if named else 0
    rest = [name for column, name in enumerate(names) if column not in (users, *counters)]
    are_numbers = bool(rest) and all(map(_is_number, rest))
    if are_numbers and not named and not counters and not _ascend(rest):
        return _Layout(False, 0, [], False)
    # A header, then, if it can be one: every name once, and numbers only as columns are counted by.
    if not rest or len(set(rest)) < len(rest) or not all(rest) or not _ascend([n for n in rest if _is_number(n)]):
        raise _ambiguous(path, "its first line is neither a header nor an id and numbers")
    if not named and (len(counters) > 1 or (are_numbers and not counters and not _is_counted(names[0], rest))):
        raise _ambiguous(path, "its first line may be a header or a user's numbers, and names no id")
    if not named and not counters and names[0] in _counted_alike(names):
        raise _ambiguous(path, f"its first column, {names[0]}, is named like the numbers, and none is named as the id")
    if (alike := _counted_alike(rest)) and (odd := [name for name in rest if name not in alike]):
        raise _ambiguous(path, f"the columns {', '.join(odd[:3])} are not named like the other numbers")
    return _Layout(True, users, [column for column in counters if column != users], bool(named or not counters))


def _ambiguous(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why[:200]}; {_REMEDY}")


def _counted_alike(names: Sequence[str]) -> set[str]:
    """The columns that are counted like another one: dim_0, dim_1, .."""
    found = {name: match[1] for name in names if (match := _NUMBERED.fullmatch(name))}
    stems = Counter(found.values())
    return {name for name, stem in found.items() if stems[stem] > 1}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _ascend(names: Sequence[str]) -> bool:
    """Tells whether these are whole numbers, each greater than the one before."""
    whole = [int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 10]
    return len(whole) == len(names) and all(a < b for a, b in itertools.pairwise(whole))


def _is_counted(first: str, rest: Sequence[str]) -> bool:
    """Tells whether so many columns are counted, after one that is no number, that they can only be a header's."""
    return not _is_number(first) and len(rest) > 2 and _count(rest)


def _are_whole(texts: Sequence[str]) -> bool:
    return all(text.isascii() and text.isdigit() for text in texts)


def _count(texts: Sequence[str]) -> bool:
    """Tells whether these are 0, 1, 2, .. or 1, 2, 3, .."""
    return bool(texts) and any(all(t == str(n) for n, t in enumerate(texts, first)) for first in (0, 1))
