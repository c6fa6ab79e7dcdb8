"""The forms that Persona-Chat and its relatives are published in: which files, and how each is read.

ParlAI's text (ConvAI2): numbered lines, starting again at 1 with every dialogue: first `N your persona: SENTENCE` and
`N partner's persona: SENTENCE`, whichever the file tells of, then `N PARTNER<TAB>REPLY`, where the owner of "your
persona" replies. The full release has two more columns: an empty one, and the candidate replies, separated by `|`, the
true one among them.

ConvAI2's training data as JSON: `{"train": [...], "valid": [...]}`, each entry `{"personality": [...], "utterances":
[{"candidates": [...], "history": [...]}]}`, where `history` is all that was said before, the partner first, and the
last candidate is the true reply.

Its human evaluation as JSON: a list of `{"dialog": [{"text", "sender_class"}], "user_profile": [...], "bot_profile":
[...]}`; the human plays `user_profile`.

Synthetic-Persona-Chat, dialogues that a language model wrote for two personas, as CSV: columns `user 1 personas` and
`user 2 personas`, a sentence a line, and `Best Generated Conversation`, whose lines begin with `User 1:` or `User 2:`,
stage directions aside; cells with line breaks stand in quotes.
"""

import csv
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.persona_chat.dialogues import Dialogue, Turn, Whose, pair
from e2p_jax.errors import UserError
from e2p_jax.text_files import LONGEST, Line, decode, parse_json, read_lines

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


EVALUATIONS = (
    "summer_wild_evaluation_dialogs.json",
    "data_tolokers.json",
    "data_intermediate.json",
    "data_volunteers.json",
)


def read_training(path: Path, part: str, bad: BadRecords) -> list[Dialogue]:
    """The dialogues of one part, `train` or `valid`.

    Raises:
      UserError: the file is not of this form, or an entry breaks it, named by its number.
    """
    entries = _load(path)
    if not isinstance(entries, dict) or not isinstance(entries.get(part), list):
        raise UserError(f"{path}: must be a JSON object with a list {part!r}")
    return _parse(entries[part], f"{path} {part}", _training_dialogue, bad)


def read_evaluation(path: Path, bad: BadRecords) -> list[Dialogue]:
    """The dialogues of a human evaluation; those in which the human answers nothing have no turns.

    Raises:
      UserError: the file is not of this form, or an entry breaks it, named by its number.
    """
    entries = _load(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: must be a JSON list of dialogues")
    return _parse(entries, str(path), _evaluation_dialogue, bad)


def _parse(entries: list[Any], where: str, parse: Any, bad: BadRecords) -> list[Dialogue]:
    numbered = ((number, entry, f"{where}[{number}]") for number, entry in enumerate(entries))
    return list(bad.parse(numbered, lambda entry: parse(*entry), where))


def _training_dialogue(number: int, entry: Any, place: str) -> Dialogue:
    persona = _texts(entry, "personality", place)
    utterances = _field(entry, "utterances", place)
    if not isinstance(utterances, list) or not utterances:
        raise UserError(f"{place}: utterances must be a list of {{candidates, history}} objects")
    turns: list[Turn] = []
    for row, utterance in enumerate(utterances):
        here = f"{place}.utterances[{row}]"
        *others, reply = _texts(utterance, "candidates", here)
        history = _texts(utterance, "history", here)
        before = [text for turn in turns for text in (turn.partner, turn.reply)]
        if history[:-1] != tuple(before):
            raise UserError(f"{here}: history must be that of the utterance before, its true reply and one more text")
        turns.append(Turn(history[-1], reply, (reply, *others)))
    return Dialogue(number, persona, (), tuple(turns), place)


def _evaluation_dialogue(number: int, entry: Any, place: str) -> Dialogue:
    said = _field(entry, "dialog", place)
    if not isinstance(said, list):
        raise UserError(f"{place}: dialog must be a list of {{text, sender_class}} objects")
    spoken = []
    for row, message in enumerate(said):
        text, sender = (_field(message, key, f"{place}.dialog[{row}]") for key in ("text", "sender_class"))
        if not isinstance(text, str) or sender not in ("Human", "Bot"):
            raise UserError(f"{place}.dialog[{row}]: text must be a text and sender_class Human or Bot, not {sender!r}")
        if text := " ".join(text.split()):
            spoken.append((sender == "Human", text))
    persona, partner = (_texts(entry, key, place) for key in ("user_profile", "bot_profile"))
    return Dialogue(number, persona, partner, pair(spoken), place)


def _load(path: Path) -> Any:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    return parse_json(text, str(path), "export it again")


def _field(entry: Any, key: str, place: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise UserError(f"{place}: must be a JSON object with the key {key!r}")
    return entry[key]


def _texts(entry: Any, key: str, place: str) -> tuple[str, ...]:
    """At least one text, none of them blank, without white space around them."""
    texts: Sequence[Any] = _field(entry, key, place)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{place}: {key} must be a list of texts, none of them empty")
    return tuple(text.strip() for text in texts)


COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
# What nobody says: an ornament, or a line that stands in brackets as a whole, such as [A few minutes later].
_STAGE = re.compile(r"[*_\s-]+|\[[^\]]*\]?|\([^)]*\)?")
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
        if not cell.strip() and column != COLUMNS[2]:  # one conversation of the release is empty: nobody answers
            raise UserError(f"{place}: column {column!r} is empty")
    one, two = (tuple(line.strip() for line in cell.splitlines() if line.strip()) for cell in cells[:2])
    said: list[tuple[str, str]] = []
    for line in filter(str.strip, cells[2].splitlines()):
        speaker = _SPEAKER.match(line.strip())
        if speaker:
            said.append((speaker[1], line.strip()[speaker.end() :]))
        elif said and not _STAGE.fullmatch(line.strip()):  # a line break inside what someone says
            said[-1] = (said[-1][0], f"{said[-1][1]} {line.strip()}")
    first, second = (pair([(speaker == me, text) for speaker, text in said if text]) for me in "12")
    return Dialogue(number, one, two, first, place), Dialogue(number, two, one, second, place)


PARTS = ("train", "valid", "test")

Files = list[tuple[str, Path]]  # part of the release, and the file it is in
Readings = Sequence[Sequence[Dialogue]]  # the dialogues of a file, once for each user who replies


@dataclasses.dataclass(frozen=True)
class Form:
    """The layout of a release."""

    files: Callable[[Path], Files]  # of a directory; raises UserError where one is missing
    read: Callable[[Path, str, BadRecords], Readings]  # of a file, for one of its parts
    vectors: tuple[str, ...] = ()  # endings of the names of the vector files, one for each reading
    has_parts: bool = True  # else some users are held out of the one part there is


def text_form(whose: Whose, wording: str, candidates: bool) -> Form:
    """ParlAI's text form: `train_self_original.txt` and so on."""
    stem = f"{whose}_{wording}"

    def files(directory: Path) -> Files:
        paths = {part: directory / f"{part}_{stem}.txt" for part in PARTS}
        if not candidates:  # the release may have them in files of their own
            bare = {part: directory / f"{part}_{stem}_no_cands.txt" for part in PARTS}
            paths = {part: bare[part] if bare[part].is_file() else path for part, path in paths.items()}
        if found := [(part, path) for part, path in paths.items() if path.is_file()]:
            return found
        raise UserError(
            f"{directory}: holds none of {', '.join(path.name for path in paths.values())}; part of the ConvAI2 "
            "(Persona-Chat) release, which ParlAI downloads"
        )

    def read(path: Path, part: str, bad: BadRecords) -> Readings:
        return [read_dialogues(path, bad, whose)]

    return Form(files, read, ("",) if whose == "self" else ())


def _training_files(directory: Path) -> Files:
    path = directory / "personachat_self_original.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; ConvAI2's training data as JSON")
    return [(part, path) for part in ("train", "valid")]


def _evaluation_files(directory: Path) -> Files:
    if found := [path for name in EVALUATIONS if (path := directory / name).is_file()]:
        return [("train", path) for path in found]
    raise UserError(f"{directory}: holds none of {', '.join(EVALUATIONS)}; add one")


def _generated_files(directory: Path) -> Files:
    prefix = "Synthetic-Persona-Chat_"
    paths = [(part, directory / f"{start}{part}.csv") for part in PARTS for start in (prefix, "")]
    found = [(part, path) for part, path in paths if path.is_file()]
    if not found or len(found) > len(dict(found)):
        raise UserError(
            f"{directory}: must hold train.csv, valid.csv or test.csv of Synthetic-Persona-Chat, each once, with or "
            f"without {prefix!r} in front; it holds {[path.name for _, path in found]}"
        )
    return found


def _read_generated(path: Path, part: str, bad: BadRecords) -> Readings:
    return list(zip(*read_both(path, bad), strict=True))


TRAINING_JSON = Form(_training_files, lambda path, part, bad: [read_training(path, part, bad)], ("",))
EVALUATION_JSON = Form(_evaluation_files, lambda path, part, bad: [read_evaluation(path, bad)], has_parts=False)
GENERATED = Form(_generated_files, _read_generated, ("_user1", "_user2"))
