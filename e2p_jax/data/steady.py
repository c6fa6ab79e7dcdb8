"""Makes a template steady that shows a reply in one way when it is the last turn and in another when it is not.

Thinking models' templates write `<think>` in front of the last reply alone, or in their generation prompt; others write
an end of text after the last turn. One conversation is one row here, in which every reply is learned, so all have to
look the same. `steady.jinja` renders each as the original does when a question follows it, and puts in front of it
what `data.thinking` asks for. What the original writes around words is found out with words that say nothing.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from e2p_jax.config import Thinking

_TEMPLATE = Path(__file__).parent / "steady.jinja"
# Of the template, where a call ends with what opens the tool's turn: in place of what a question would bring.
_CALLED = """
            {%- if message['tool_calls'] and (n + 1 == total or said[n + 1]['role'] == 'tool') -%}
                {%- set bare = (reply | length) - (LATE | length) -%}
                {%- set reply = reply[:bare] ~ OPENS if reply[bare:] == LATE else reply -%}
            {%- endif -%}"""
_SWITCHES = ("enable_thinking", "thinking")  # variables by which templates are told to think
_USER, _REPLY, _NEXT, _THOUGHT = "zqxejv", "zqxfjv", "zqxgjv", "zqxhjv"
_OPENER = re.compile(r"\s*([<\[])(\w+)([>\]])\s*")  # of a thinking block, as a generation prompt writes it
_EMPTY = re.compile(r"(\s*[<\[](\w+)[>\]])(\s*)([<\[]/\2[>\]]\s*)")

Render = Callable[..., str]  # of messages, a generation prompt or none, and the variable `settings`


class Block(NamedTuple):
    """What stands around thoughts, and what stands in front of a reply without any."""

    begin: str
    end: str
    empty: str


@dataclasses.dataclass(frozen=True)
class Around:
    """What a template writes around words."""

    prompt: str  # from a question to where a generation prompt ends
    lead: str  # from a question to its reply, when another question follows
    last_lead: str  # when none does
    after: str  # from a reply to the next question
    last_after: str  # from the last reply to the end
    thoughts: tuple[str, str] | None  # from a question to the thoughts on it, and from these to the reply


class Steady(NamedTuple):
    """A steady template."""

    source: str  # with generation markers
    thinks: bool  # it has a thinking block, or a switch for one
    late: bool  # the original ends a reply only when another turn follows
    note: str  # what to say of it, in a line


def make_steady(
    tokenizer: PreTrainedTokenizerBase, template: str, thinking: Thinking, stops: Collection[int]
) -> Steady | None:
    """Writes the steady form of a tokenizer's chat template.

    Args:
      template: without markers.
      thinking: not `auto`.
      stops: ids that end a reply, beside the EOS.

    Returns:
      None where the template does not show words that say nothing, or opens replies with what is no thinking block.

    Raises:
      Exception: whatever the template raises.
    """
    switches = [name for name in _SWITCHES if re.search(rf"(?<![\w.'\"]){name}\b", template)]
    settings = "".join(f"{{% set {name} = {str(thinking == 'full').lower()} %}}" for name in switches)
    settings += "\n" if settings else ""  # which goes with the tag

    def render(messages: list[dict[str, Any]], prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages, chat_template=settings + template, add_generation_prompt=prompt, tokenize=False
        )
        return str(text)

    around = _look(render)
    if around is None:
        return None
    tokens = sorted((str(token.content) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    head = _common(around.prompt, around.lead, tokens)
    opener, lead = around.prompt[len(head) :], around.lead[len(head) :]
    block = _block(around, head, opener, lead, told=bool(switches) and thinking != "full")
    if block is None or (thinking == "full" and not block.end):
        return None
    if thinking == "full":
        begin = block.begin.removeprefix(opener)
        without = block.empty.removeprefix(opener) if block.empty and block.empty.startswith(opener) else lead
        thoughts = (
            f"({_literal(begin)} ~ message['reasoning_content'].strip('\\n') ~ {_literal(block.end)} if "
            f"message['reasoning_content'] is string and message['reasoning_content'].strip() else {_literal(without)})"
        )
        front, cut, said = opener, lead, "with their thoughts"
    else:
        front = block.empty if thinking == "empty" else ""
        thoughts, cut = "''", lead if front else ""
        said = f"after {front!r}" if front else "without a thinking block" if block.empty else ""
    end = _end(around, tokens, _opening(render, tokens), {*stops, tokenizer.eos_token_id}, tokenizer)
    late = not around.last_after.startswith(end)
    call_end = _call_end(render, end, tokens) if late else ""
    steady_end = not late and around.lead == around.last_lead
    values = {
        "SETTINGS": settings.rstrip(),
        "USER": _literal(around.after[len(end) :]),
        "AFTER": _literal(around.after),
        "PROMPT": _literal(around.prompt),
        "WORD": _literal(_NEXT),
        "REPLY": _literal(_REPLY),
        "OPENER": _literal(opener),
        "LEAD": _literal(lead),
        "CUT": _literal(cut),
        "FRONT": _literal(front),
        "THOUGHTS": thoughts,
        "CALLED": _CALLED.replace("LATE", _literal(end)).replace("OPENS", _literal(call_end)) if call_end else "",
        "DONE": "before ~ reply" if call_end else "asked[:end]",
        "TAIL": _literal(around.last_after[len(end) :] if steady_end else ""),
        "ORIGINAL": template,
    }
    names = re.compile("|".join(values))
    source = names.sub(lambda name: values[name[0]], _TEMPLATE.read_text(encoding="utf-8"))
    note = f"every reply is shown {said}" if said else "every reply is shown as when a question follows it"
    return Steady(source, bool(block.empty or block.end or switches), late, note)


def _look(render: Render) -> Around | None:
    """None where a word is absent, or stands there more than once."""
    asked, replied = {"role": "user", "content": _USER}, {"role": "assistant", "content": _REPLY}
    prompt = _pieces(render([asked], True), _USER)
    last = _pieces(render([asked, replied], False), _USER, _REPLY)
    later = _pieces(render([asked, replied, asked | {"content": _NEXT}], True), _USER, _REPLY, _NEXT)
    if prompt is None or last is None or later is None or later[3] != prompt[1]:
        return None
    thought = _pieces(render([asked, replied | {"reasoning_content": _THOUGHT}], False), _USER, _THOUGHT, _REPLY)
    thoughts = None if thought is None else (thought[1], thought[2])
    return Around(prompt[1], later[1], last[1], later[2], last[2], thoughts)


def _pieces(text: str, *words: str) -> list[str] | None:
    """What stands before, between and after the words."""
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _block(around: Around, head: str, opener: str, lead: str, told: bool) -> Block | None:
    """None where a generation prompt opens a reply with what is no thinking block.

    Args:
      head: what prompts and replies begin with alike; `opener` and `lead` are what each goes on with.
      told: the template was told not to think.
    """
    last = around.last_lead[len(head) :] if around.last_lead.startswith(head) else lead
    markup = _OPENER.fullmatch(opener)
    if opener and (told or _EMPTY.fullmatch(opener)):
        empty = opener
    elif last != lead:
        empty = last
    elif markup:
        empty = f"{opener}\n{markup[1]}/{markup[2]}{markup[3]}\n\n"
    elif opener:
        return None
    else:
        empty = ""
    if around.thoughts and around.thoughts[0].startswith(head):
        begin = around.thoughts[0][len(head) :]
        if begin.startswith(opener):
            return Block(begin, around.thoughts[1], empty)
    whole = _EMPTY.fullmatch(empty)
    if whole is None:
        return Block("", "", empty)
    line = whole[3][: len(whole[3]) // 2]
    return Block(whole[1] + line, line + whole[4], empty)


def _opening(render: Render, tokens: list[str]) -> str:
    """The added token that opens a user's turn, if one does."""
    return next(_held(render([{"role": "user", "content": _USER}], False).partition(_USER)[0], tokens), "")


def _end(
    around: Around, tokens: list[str], opening: str, stops: set[int | None], tokenizer: PreTrainedTokenizerBase
) -> str:
    """What ends a reply: written after the last one as after others; else the token that the next turn brings."""
    end = _common(around.last_after, around.after, tokens)
    first = next(_held(around.after, tokens), "")
    if next(_held(end, tokens), "") or not first:
        return end
    if first == opening and tokenizer.convert_tokens_to_ids(first) not in stops:
        return end
    return around.after[: around.after.index(first) + len(first)]


def _call_end(render: Render, end: str, tokens: list[str]) -> str:
    """What opens a tool's turn, where a call is ended by what the next turn brings, `end` if it is a question's."""
    asked = {"role": "user", "content": _USER}
    said = {"role": "tool", "content": _REPLY, "name": _NEXT, "tool_call_id": "zqxcall00"}
    for arguments, content in itertools.product(({_NEXT: _THOUGHT}, json.dumps({_NEXT: _THOUGHT})), ("", None)):
        call = {"type": "function", "id": "zqxcall00", "function": {"name": _NEXT, "arguments": arguments}}
        called = {"role": "assistant", "content": content, "tool_calls": [call]}
        try:
            alone, *more = (render([asked, called, *turns], False) for turns in ([], [asked], [said]))
        except Exception:  # whatever a template may raise
            continue
        question, answer = (text.removeprefix(alone) for text in more)
        if _THOUGHT in alone and question.startswith(end):
            return next((token for token in tokens if answer.startswith(token)), "")
    return ""


def _held(text: str, tokens: list[str]) -> Iterator[str]:
    """The added tokens of a text, the first of them first."""
    places = sorted((text.index(token), -len(token), token) for token in tokens if token in text)
    return (token for _, _, token in places if not token.isspace())


def _common(one: str, other: str, tokens: list[str]) -> str:
    """What both begin with, which ends inside no added token of either."""
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for text in (one, other):
        for token in tokens:
            begin = text.rfind(token, 0, length + len(token) - 1)
            if 0 <= begin < length < begin + len(token):
                length = begin
    return one[:length]


def _literal(text: str) -> str:
    """In Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
