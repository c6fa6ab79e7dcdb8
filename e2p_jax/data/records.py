"""The record that every dataset yields, and the readers of each place records live in."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from e2p_jax.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation of one user; assistant turns are what the user said, clicked or played."""

    user_id: str
    context: tuple[str, ...]  # what the user vector stands for, as text
    messages: tuple[dict[str, str], ...]  # {"role", "content"}
    candidates: tuple[str, ...] = ()  # for ranking, the true one first
    references: tuple[str, ...] = ()
    source: str = ""  # file and row, for errors

    @property
    def reply_words(self) -> int:
        """White-space separated words of all assistant turns: the denominator of per-word perplexity."""
        return sum(len(m["content"].split()) for m in self.messages if m["role"] == "assistant")


def check(record: Record) -> Record:
    """Returns `record`, or refuses it.

    Raises:
      UserError: naming the row and what is wrong with it.
    """
    if not record.messages:
        raise UserError(f"{record.source}: empty dialogue; every record needs messages")
    for number, message in enumerate(record.messages):
        if message.get("role") not in ROLES:
            raise UserError(f"{record.source}: message {number} has role {message.get('role')!r}, not one of {ROLES}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise UserError(f"{record.source}: message {number} ({message['role']}) has no text")
    if not any(m["role"] == "assistant" for m in record.messages):
        raise UserError(f"{record.source}: no assistant turn, so there is nothing to learn from; add one or drop it")
    return record


def from_json(values: Any, source: str) -> Record:
    """A decoded JSON object -> `Record`; `{user_id, prompt, response}` is accepted as shorthand.

    Raises:
      UserError: a missing, unknown or malformed key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(values).__name__}")
    values = {key: value for key, value in values.items() if key != "split"}
    if "messages" not in values and {"prompt", "response"} <= values.keys():
        prompt, response = values.pop("prompt"), values.pop("response")
        values["messages"] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    known = {"user_id", "context", "messages", "candidates", "references"}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{source}: unknown keys {unknown}; a record has {sorted(known)}")
    if missing := sorted({"user_id", "messages"} - values.keys()):
        raise UserError(f"{source}: missing keys {missing} (or prompt and response in place of messages)")
    for key in known - {"user_id"}:
        if not isinstance(values.get(key, []), list):
            raise UserError(f"{source}: {key} must be a list")
    if not all(isinstance(message, dict) for message in values["messages"]):
        raise UserError(f"{source}: messages must be a list of {{role, content}} objects")
    return check(
        Record(
            user_id=str(values["user_id"]),
            context=tuple(map(str, values.get("context", ()))),
            messages=tuple(values["messages"]),
            candidates=tuple(map(str, values.get("candidates", ()))),
            references=tuple(map(str, values.get("references", ()))),
            source=source,
        )
    )


def read_jsonl(path: Path, split: str) -> list[Record]:
    """Reads the records of one split from JSON Lines; a record without a `split` key belongs to `train`.

    Raises:
      UserError: a malformed line, named by its number.
    """
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{source}: malformed JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(values, dict) or values.get("split", "train") == split:
                records.append(from_json(values, source))
    return records


def write_jsonl(records: Iterable[Record], path: Path) -> None:
    """Writes records as JSON Lines, atomically."""
    from e2p_jax.files import write_text

    lines = []
    for record in records:
        values = {k: v for k, v in dataclasses.asdict(record).items() if k != "source" and (v or k == "context")}
        lines.append(json.dumps(values, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")
