"""Text files of rows: CSV, TSV and their relatives, and JSON Lines."""

import csv
import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from e2p_jax.errors import UserError
from e2p_jax.json_files import loads

LONGEST = 1 << 24  # characters of a line; beyond it a line end or a closing quote is missing
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a file, without its end."""

    place: str  # file:row, for errors
    content: bytes


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of rows that all have the same columns."""

    path: Path
    columns: Sequence[str]
    delimiter: str
    encoding: str
    has_header: bool

    def lines(self) -> Iterator[Line]:
        """The lines that hold rows: no header, no blank lines."""
        header = self.has_header
        for line in read_lines(self.path):
            if header:
                header = False
            elif line.content.strip():
                yield line

    def cells(self, line: Line) -> list[str]:
        """One text a column.

        Quotes are undone where the line is well-formed CSV. A quote is an ordinary character where it is not, and in
        a table whose delimiter is longer than one character.

        Raises:
          UserError: naming the row, and the column where one is at fault.
        """
        text = decode(line, self.encoding)
        cells = _split(text, self.delimiter, len(self.columns))
        if len(cells) != len(self.columns):
            raise UserError(
                f"{line.place}: {len(cells)} columns, expected {len(self.columns)} ({', '.join(self.columns)}) "
                f"separated by {self.delimiter!r}"
            )
        return cells


def open_table(path: Path, delimiter: str, columns: Sequence[str] | None = None, encoding: str = "utf-8") -> Table:
    """A table with the given columns, whether or not its first line names them; without, its first line must.

    Raises:
      UserError: an empty file, or a header that does not name every column once.
    """
    first = next(read_lines(path), None)
    if first is None or not first.content.strip():
        raise UserError(f"{path}: {'empty' if first is None else 'its first line is empty'}; it must hold a table")
    if columns is not None:
        cells = decode(first, encoding).split(delimiter)
        return Table(path, columns, delimiter, encoding, cells[0].strip(' "').lower() == columns[0].lower())
    names = [name.strip() for name in _split(decode(first, encoding), delimiter, 0)]
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"{first.place}: the header must name every column once, and names {shortened(names)}")
    return Table(path, names, delimiter, encoding, True)


def read_lines(path: Path) -> Iterator[Line]:
    """Every line, numbered from 1, without its end (LF, CRLF, or CR alone in all of the file) and without a byte order
    mark; of a .gz file, what it holds.

    Raises:
      UserError: a damaged .gz file.
    """
    row = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            # Where a lone CR ends a line, as on old Macs, no LF does, and the first line is all of the file.
            first = next(lines, b"")
            ends_in_cr = b"\r" in first and not first.endswith(b"\n")
            every = (
                first.removesuffix(b"\r").split(b"\r") if ends_in_cr else itertools.chain([first] * bool(first), lines)
            )
            for row, line in enumerate(every, 1):
                yield Line(f"{path}:{row}", line.rstrip(b"\r\n").removeprefix(_BOM if row == 1 else b""))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged after row {row} ({error}); copy it again") from error


def decode(line: Line, encoding: str = "utf-8") -> str:
    """A line's text.

    Raises:
      UserError: naming the row and column of a byte that does not belong, or a line longer than `LONGEST`.
    """
    if len(line.content) > LONGEST:
        raise UserError(f"{line.place}: {len(line.content)} bytes in one line; a line end is missing")
    try:
        return line.content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{line.place}: column {error.start + 1}: not {encoding} (byte 0x{line.content[error.start]:02x}); "
            f"save the file as {encoding}"
        ) from error


def decode_json(line: Line) -> Any:
    """Reads a line of JSON Lines.

    Raises:
      UserError: naming the row and column.
    """
    return parse_json(decode(line), line.place, "write one object a line")


def parse_json(text: str, place: str, remedy: str) -> Any:
    """Reads JSON.

    Raises:
      UserError: what `json_files.loads` refuses, naming the line and column of `text`, or the key.
    """
    try:
        return loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: malformed JSON ({error.msg} at {where}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{place}: {error}; {remedy}") from error


def shortened(names: Sequence[str]) -> list[str]:
    """Gives what an error can show of them."""
    return [name[:40] for name in names[:12]]


def number(text: str, column: str, place: str) -> float:
    """A finite number of at least 0.

    Raises:
      UserError: naming the row and column.
    """
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"{place}: column {column!r} is {text[:40]!r}, not a number") from error
    if not 0 <= value < float("inf"):
        raise UserError(f"{place}: column {column!r} is {text[:40]!r}; it must be finite and not negative")
    return value


def _split(text: str, delimiter: str, count: int) -> list[str]:
    """Cells by the rules of CSV, if those give `count` of them (or any number, for 0), else between the delimiters."""
    plain = text.split(delimiter)
    if len(delimiter) > 1 or '"' not in text:
        return plain
    limit = csv.field_size_limit(LONGEST)
    try:
        cells = next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error:
        return plain
    finally:
        csv.field_size_limit(limit)
    return cells if count in (0, len(cells)) or len(plain) != count else plain
