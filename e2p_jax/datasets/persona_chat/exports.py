"""ConvAI2 as JSON. Two forms are in use.

The training data: `{"train": [...], "valid": [...]}`, each entry `{"personality": [...], "utterances": [{"candidates":
[...], "history": [...]}]}`, where `history` is all that was said before, the partner first, and the last candidate is
the true reply. The dialogues of the competition's human evaluation: a list of `{"dialog": [{"text", "sender_class"}],
"user_profile": [...], "bot_profile": [...]}`; the human plays `user_profile`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.persona_chat.dialogues import Dialogue, Turn, pair
from e2p_jax.errors import UserError
from e2p_jax.text_files import parse_json

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
