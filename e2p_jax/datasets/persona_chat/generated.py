"""Synthetic-Persona-Chat: dialogues that a language model wrote for two personas, as CSV.

Columns `user 1 personas` and `user 2 personas`, a sentence a line, and `Best Generated Conversation`, whose lines begin
with `User 1:` or `User 2:`; cells with line breaks stand in quotes.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.persona_chat.dialogues import Dialogue, pair
from e2p_jax.errors import UserError
from e2p_jax.text_files import LONGEST, read_lines

COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
_SPEAKER = re.compile(r"[*\s]*user ([12])[*\s]*:[*\s]*", re.IGNORECASE)  # some rows have it in bold


def read_both(path: Path, bad: BadRecords) -> list[tuple[Dialogue, Dialogue]]:
    """Each conversation as user 1 has it, and as user 2 has it; one without turns where that user answers nothing.

    Raises:
      UserError: a row that breaks the format, named by the number of its first line.
    """
    rows = _rows(path)
    header = next(rows, None)
    if header is None or [cell.strip() for cell in header[2]] != list(COLUMNS):
        raise UserError(f"{path}:1: the header must be {','.join(COLUMNS)}")
    pairs = list(bad.parse(rows, lambda row: _conversation(*row), path))
    if not pairs:
        raise UserError(f"{path}: holds no conversation")
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Number from 0 on (-1 for the header), place and cells of each row; broken UTF-8 shows as lone surrogates."""
    first = 1
    texts = (line.content.decode(errors="surrogateescape") + "\n" for line in read_lines(path))
    limit = csv.field_size_limit(LONGEST)
    try:
        reader = csv.reader(texts, strict=True)
        for number, cells in enumerate(reader, -1):
            yield number, f"{path}:{first}", cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{first}: malformed CSV in the row that begins here ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _conversation(number: int, place: str, cells: list[str]) -> tuple[Dialogue, Dialogue]:
    if len(cells) != len(COLUMNS):
        raise UserError(f"{place}: {len(cells)} columns, expected {len(COLUMNS)} ({', '.join(COLUMNS)})")
    for column, cell in zip(COLUMNS, cells, strict=True):
        if not cell.isprintable() and any("\udc80" <= character <= "\udcff" for character in cell):
            raise UserError(f"{place}: column {column!r} is not UTF-8; save the file as UTF-8")
        if not cell.strip():
            raise UserError(f"{place}: column {column!r} is empty")
    one, two = (tuple(line.strip() for line in cell.splitlines() if line.strip()) for cell in cells[:2])
    said: list[tuple[str, str]] = []
    for line in filter(str.strip, cells[2].splitlines()):
        speaker = _SPEAKER.match(line.strip())
        if speaker:
            said.append((speaker[1], line.strip()[speaker.end() :]))
        elif said:  # a line break inside what someone says; before anyone speaks, an ornament
            said[-1] = (said[-1][0], f"{said[-1][1]} {line.strip()}")
    first, second = (pair([(speaker == me, text) for speaker, text in said if text]) for me in "12")
    return Dialogue(number, one, two, first, place), Dialogue(number, two, one, second, place)
