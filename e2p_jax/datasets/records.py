"""The record that every dataset yields, and the readers of each place records live in."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.errors import UserError
from e2p_jax.files import existing, write_text
from e2p_jax.text_files import Line, decode_json, read_lines, shortened
from e2p_jax.vectors.index import distinct

ROLES = ("system", "user", "assistant", "tool")
_MORE = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("name", "tool_call_id")}  # keys of a message


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One conversation of one user; assistant turns are what the user said, clicked or played."""

    user_id: str
    context: tuple[str, ...]  # what the user vector stands for, as text
    messages: tuple[dict[str, Any], ...]  # {"role", "content"} and what `from_json` says
    candidates: tuple[str, ...] = ()  # for ranking, the true one first
    references: tuple[str, ...] = ()
    source: str = ""  # file and row, for errors
    tools: tuple[dict[str, Any], ...] = ()  # schemas of the functions that may be called
    items: tuple[str, ...] = ()  # ids in `data.items` that the last reply stands for

    @property
    def reply_words(self) -> int:
        """White-space separated words of all assistant turns: the denominator of per-word perplexity."""
        return sum(len(text.split()) for text in self._replies())

    @property
    def reply_bytes(self) -> int:
        """UTF-8 bytes of all assistant turns: the denominator of bits per byte."""
        return sum(len(text.encode()) for text in self._replies())

    def _replies(self) -> Iterator[str]:
        for message in self.messages:
            if message["role"] == "assistant":
                yield message["content"]
                yield message.get("reasoning_content", "")
                for call in message.get("tool_calls", ()):
                    yield call["function"]["name"]
                    yield json.dumps(call["function"]["arguments"], ensure_ascii=False)


def check(record: Record) -> Record:
    """Returns `record`, or refuses it.

    Raises:
      UserError: naming the row and what is wrong with it.
    """
    _check_messages(record)
    if not any(m["role"] == "assistant" for m in record.messages):
        raise UserError(f"{record.source}: no assistant turn, so there is nothing to learn from; add one or drop it")
    return record


def from_json(values: Any, source: str) -> Record:
    """A decoded JSON object -> `Record`; `{user_id, prompt, response}` is accepted as shorthand.

    Of a message, `content` may be a list of text parts, which are joined. An assistant's may have thoughts
    (`reasoning_content`), and `tool_calls`, with or without text; a tool's may have `name` and `tool_call_id`. `tools`
    of a record lists the functions that may be called.

    Raises:
      UserError: a missing, unknown or malformed key.
    """
    if isinstance(values, dict) and "messages" not in values and {"prompt", "response"} <= values.keys():
        turns = (("user", "prompt"), ("assistant", "response"))
        messages = [{"role": role, "content": values[key]} for role, key in turns]
        values = {k: v for k, v in values.items() if k not in ("prompt", "response")} | {"messages": messages}
    return check(_parse(values, source))


def read_jsonl(path: Path, split: str, bad: BadRecords | None = None) -> Iterator[Record]:
    """Reads the records of one split from JSON Lines, one by one: they need not be there all at once.

    A record says its split in the key `split` (`train` without one). Where no record does, one user in twenty, two
    at least, is `validation`, chosen by a hash of the user id, and the others are `train`. `all` is every record.

    Raises:
      UserError: a malformed line, named by its number, unless `bad` skips it; or too many of them.
    """
    bad = bad or BadRecords()

    def parsed() -> Iterator[tuple[Record, str | None]]:
        return bad.parse(_lines(path), _record_and_split, path)

    named = split == "all"

    def users() -> Iterator[str]:
        nonlocal named
        for record, name in parsed():
            if named := name is not None:
                return
            yield record.user_id

    is_held_out = hold_out(() if named else users())
    for record, name in parsed():
        own = (name or "train") if named else ("validation" if is_held_out(record.user_id) else "train")
        if split in ("all", own):
            yield record


def hold_out(users: Iterable[str]) -> Callable[[str], bool]:
    """Chooses one in twenty of them, two at least, by a hash of the id; none of three or fewer.

    Args:
      users: each as often as he comes; read one by one, 8 bytes of each are held.

    Returns:
      Whether one of these users was chosen.
    """
    hashes = distinct(np.fromiter(map(_hash, users), np.uint64))
    last = int(hashes[max(2, len(hashes) // 20) - 1]) if len(hashes) > 3 else -1
    return lambda user: _hash(user) <= last


def _hash(user: str) -> int:
    return int.from_bytes(hashlib.sha256(user.encode()).digest()[:8])


def read_prompts(path: Path) -> list[Record]:
    """Reads `{user_id, prompt}` or `{user_id, messages}` lines to be answered: the last turn is the user's.

    Raises:
      UserError: a missing file or a malformed line, named by its number.
    """
    records = []
    for line in _lines(existing(path, "--input", only_file=True)):
        source, values = line.place, decode_json(line)
        if isinstance(values, dict) and "messages" not in values and "prompt" in values:
            messages = [{"role": "user", "content": values["prompt"]}]
            # A file to train on may be asked again: its response is left out.
            values = {k: v for k, v in values.items() if k not in ("prompt", "response")} | {"messages": messages}
        records.append(to_answer(values, source))
    return records


def to_answer(values: Any, source: str) -> Record:
    """A decoded `{user_id, messages}` -> `Record` whose last turn is the user's, or a tool's.

    Raises:
      UserError: a missing, unknown or malformed key, or another last turn.
    """
    record = _parse(values, source)
    _check_messages(record)
    if record.messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{source}: the last message must be a user turn, or a tool's, to be answered")
    return record


def _record_and_split(line: Line) -> tuple[Record, str | None]:
    values = decode_json(line)
    return from_json(values, line.place), values.get("split")


def _lines(path: Path) -> Iterator[Line]:
    """The lines that are not blank."""
    return (line for line in read_lines(path) if line.content.strip())


def _parse(values: Any, source: str) -> Record:
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(values).__name__}; write one object a line")
    known = {"user_id", "context", "messages", "tools", "candidates", "references", "items", "split"}
    unknown, missing = sorted(values.keys() - known), sorted({"user_id", "messages"} - values.keys())
    if unknown or missing:
        faults = [
            f"{name} keys {shortened(keys)}" for name, keys in (("unknown", unknown), ("missing", missing)) if keys
        ]
        raise UserError(
            f"{source}: {', '.join(faults)}; a record has user_id, messages (or prompt and response), "
            "and may have context, tools, candidates, references, items, split"
        )
    user, messages = values["user_id"], values["messages"]
    # A number is written as its digits; anything else would never match the ids of a table.
    if isinstance(user, bool) or not isinstance(user, str | int) or user == "":
        raise UserError(f"{source}: user_id must be text or a whole number, not {repr(user)[:60]}")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{source}: messages must be a list of {{role, content}} objects")
    if not isinstance(values.get("split", "train"), str) or values.get("split") == "":
        raise UserError(f"{source}: split must be a name, not {repr(values['split'])[:60]}")
    context, candidates, references = (_texts(values, key, source) for key in ("context", "candidates", "references"))
    messages = [_message(message, f"{source}: message {number}") for number, message in enumerate(messages)]
    tools, items = _tools(values, source), _items(values, source)
    return Record(str(user), context, tuple(messages), candidates, references, source, tools, items)


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    """With the parts of its text joined, and its tool calls as `_call` gives them."""
    parts, calls = message.get("content"), message.get("tool_calls")
    if isinstance(parts, list):
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"{place} has a part that is no text ({repr(part)[:60]}); give text alone")
        message = message | {"content": "".join(part["text"] for part in parts)}
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    if not isinstance(calls, list):
        raise UserError(f"{place}: tool_calls must be a list of {{function: {{name, arguments}}}} objects")
    return message | {"content": message.get("content") or "", "tool_calls": [_call(call, place) for call in calls]}


def _call(call: Any, place: str) -> dict[str, Any]:
    """As `{type, function: {name, arguments}}`, arguments an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, dict) else (0, 0)
    if isinstance(arguments, str):  # as OpenAI has it
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise UserError(f"{place}: a tool call must be {{function: {{name, arguments}}}}, arguments an object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | identity


def _tools(values: dict[str, Any], source: str) -> tuple[dict[str, Any], ...]:
    tools = values.get("tools") or []
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise UserError(f"{source}: tools must be a list of {{type: function, function: {{name, ...}}}} objects")
    return tuple(tools)


def _items(values: dict[str, Any], source: str) -> tuple[str, ...]:
    items = values.get("items", [])
    if not isinstance(items, list) or not all(isinstance(i, str | int) and not isinstance(i, bool) for i in items):
        raise UserError(f"{source}: items must be a list of item ids, texts or whole numbers")
    return tuple(dict.fromkeys(map(str, items)))


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _texts(values: dict[str, Any], key: str, source: str) -> tuple[str, ...]:
    texts = values.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{source}: {key} must be a list of texts")
    return tuple(texts)


def _check_messages(record: Record) -> None:
    if not record.messages:
        raise UserError(f"{record.source}: empty dialogue; every record needs messages")
    for number, message in enumerate(record.messages):
        place = f"{record.source}: message {number}"
        if message.get("role") not in ROLES:
            raise UserError(f"{place} has role {repr(message.get('role'))[:60]}; use one of {', '.join(ROLES)}")
        text, role = message.get("content"), message["role"]
        blank = not isinstance(text, str) or not text.strip()
        if blank and not (isinstance(text, str) and (role == "tool" or message.get("tool_calls"))):
            raise UserError(f"{place} ({role}) has no text; give it some or drop it")
        allowed = ("role", "content", *_MORE.get(role, ()))
        if unknown := sorted(message.keys() - set(allowed)):
            raise UserError(f"{place} ({role}) has unknown keys {shortened(unknown)}; keep {', '.join(allowed)}")
        for key in ("reasoning_content", "name", "tool_call_id"):
            if not isinstance(message.get(key, ""), str):
                raise UserError(f"{place}: {key} must be text")


def write_jsonl(records: Iterable[Record], path: Path) -> None:
    """Writes records as JSON Lines, atomically."""
    lines = []
    for record in records:
        values = {k: v for k, v in dataclasses.asdict(record).items() if k != "source" and (v or k == "context")}
        lines.append(json.dumps(values, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")
