"""The ParlAI text form of Persona-Chat, as the ConvAI2 release has it.

Numbered lines, starting again at 1 with every dialogue: first `N your persona: SENTENCE`, then `N PARTNER<TAB>REPLY`,
where the owner of the persona replies. The full release has two more columns: an empty one, and the candidate
replies, separated by `|`, the true one among them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from e2p_jax.data.records import Record
from e2p_jax.errors import UserError

_MINE, _PARTNERS = "your persona:", "partner's persona:"


def user_id(persona: Sequence[str]) -> str:
    """Names the user who has these persona sentences, in any order."""
    return hashlib.sha256("\n".join(sorted(set(persona))).encode()).hexdigest()[:16]


def read_dialogues(path: Path) -> list[Record]:
    """Every dialogue of a file, in its order; `candidates` are those of the last turn.

    Raises:
      UserError: a line that breaks the format, named by its number.
    """
    dialogues: list[list[tuple[str, str]]] = []  # each a list of (place, text without its number)
    with path.open("rb") as lines:
        for row, line in enumerate(lines, 1):
            place = f"{path}:{row}"
            try:
                number, _, text = line.decode("utf-8-sig" if row == 1 else "utf-8").rstrip("\r\n").partition(" ")
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 (byte {error.start} of the line); convert the file") from error
            if number == "1":
                dialogues.append([])
            following = len(dialogues[-1]) + 1 if dialogues else 1
            if number != str(following):
                expected = "1" if following == 1 else f"1 (a new dialogue) or {following}"
                raise UserError(f"{place}: starts with {number[:20]!r}, expected the line number {expected}")
            dialogues[-1].append((place, text))
    if not dialogues:
        raise UserError(f"{path}: empty; it must hold dialogues in ParlAI's text form")
    return [_record(lines) for lines in dialogues]


def _record(lines: Sequence[tuple[str, str]]) -> Record:
    persona: list[str] = []
    messages: list[dict[str, str]] = []
    candidates: tuple[str, ...] = ()
    first = lines[0][0]
    for place, text in lines:
        if text.startswith((_MINE, _PARTNERS)):
            sentence = text.partition(":")[2].strip()
            if messages or not sentence:
                raise UserError(f"{place}: a persona line must have a sentence and stand before the dialogue's turns")
            if text.startswith(_MINE):
                persona.append(sentence)
            continue
        partner, reply, candidates = _turn(text, place)
        messages += [{"role": "user", "content": partner}, {"role": "assistant", "content": reply}]
    if not persona or not messages:
        raise UserError(f"{first}: this dialogue lacks {'turns' if persona else f'`{_MINE}` lines'}; it needs both")
    return Record(user_id(persona), tuple(persona), tuple(messages), candidates, source=first)


def _turn(text: str, place: str) -> tuple[str, str, tuple[str, ...]]:
    """Partner, reply, and the candidates with the reply moved to the front."""
    columns = [column.strip() for column in text.split("\t")]
    if len(columns) not in (2, 4) or not columns[0] or not columns[1] or any(columns[2:3]):
        raise UserError(
            f"{place}: expected PARTNER<TAB>REPLY, or these, an empty column and candidates; "
            f"it has {len(columns)} tab-separated columns"
        )
    if len(columns) == 2:
        return columns[0], columns[1], ()
    others = [candidate.strip() for candidate in columns[3].split("|")]
    if columns[1] not in others:
        raise UserError(f"{place}: the reply is not among its candidates (4th column)")
    others.remove(columns[1])
    return columns[0], columns[1], (columns[1], *others)
