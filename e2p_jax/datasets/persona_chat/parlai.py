"""The ParlAI text form of Persona-Chat, as the ConvAI2 release has it.

Numbered lines, starting again at 1 with every dialogue: first `N your persona: SENTENCE` and `N partner's persona:
SENTENCE`, whichever the file tells of, then `N PARTNER<TAB>REPLY`, where the owner of "your persona" replies. The full
release has two more columns: an empty one, and the candidate replies, separated by `|`, the true one among them.
"""

from collections.abc import Iterator
from pathlib import Path

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.persona_chat.dialogues import Dialogue, Turn, Whose
from e2p_jax.errors import UserError
from e2p_jax.text_files import Line, decode, read_lines

_MINE, _PARTNERS = "your persona:", "partner's persona:"
_NEEDED: dict[Whose, tuple[str, ...]] = {"self": (_MINE,), "other": (_PARTNERS,), "both": (_MINE, _PARTNERS)}


def read_dialogues(path: Path, bad: BadRecords, whose: Whose = "self") -> list[Dialogue]:
    """Every dialogue of a file, in its order.

    Args:
      whose: whose persona every dialogue must tell.

    Raises:
      UserError: a line that breaks the format, named by its number.
    """

    def parse(dialogue: tuple[int, list[Line]]) -> Dialogue:
        return _dialogue(*dialogue, whose)

    dialogues = list(bad.parse(enumerate(_split(path)), parse, path))
    if not dialogues:
        raise UserError(f"{path}: empty; it must hold dialogues in ParlAI's text form")
    return dialogues


def _split(path: Path) -> Iterator[list[Line]]:
    """The lines of each dialogue."""
    lines: list[Line] = []
    for line in read_lines(path):
        if lines and line.content.partition(b" ")[0] == b"1":
            yield lines
            lines = []
        lines.append(line)
    if lines:
        yield lines


def _dialogue(number: int, lines: list[Line], whose: Whose) -> Dialogue:
    personas: dict[str, list[str]] = {_MINE: [], _PARTNERS: []}
    turns: list[Turn] = []
    for following, line in enumerate(lines, 1):
        place = line.place
        start, _, text = decode(line).partition(" ")
        if start != str(following):
            expected = "1" if following == 1 else f"1 (a new dialogue) or {following}"
            raise UserError(f"{place}: starts with {start[:20]!r}, expected the line number {expected}")
        label = next((label for label in personas if text.startswith(label)), None)
        if label is None:
            turns.append(_turn(text, place))
            continue
        sentence = text.removeprefix(label).strip()
        if turns or not sentence:
            raise UserError(f"{place}: a persona line must have a sentence and stand before the dialogue's turns")
        personas[label].append(sentence)
    if lacking := [f"`{label}` lines" for label in _NEEDED[whose] if not personas[label]] + ["turns"] * (not turns):
        raise UserError(f"{lines[0].place}: this dialogue lacks {' and '.join(lacking)}; it needs a persona and turns")
    return Dialogue(number, tuple(personas[_MINE]), tuple(personas[_PARTNERS]), tuple(turns), lines[0].place)


def _turn(text: str, place: str) -> Turn:
    columns = [column.strip() for column in text.split("\t")]
    if len(columns) not in (2, 4) or not columns[0] or not columns[1] or any(columns[2:3]):
        raise UserError(
            f"{place}: expected PARTNER<TAB>REPLY, or these, an empty column and candidates; "
            f"it has {len(columns)} tab-separated columns"
        )
    if len(columns) == 2:
        return Turn(columns[0], columns[1])
    others = [candidate.strip() for candidate in columns[3].split("|")]
    if columns[1] not in others:
        raise UserError(f"{place}: the reply is not among its candidates (4th column)")
    others.remove(columns[1])
    return Turn(columns[0], columns[1], (columns[1], *others))
