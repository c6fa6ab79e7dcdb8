"""Learns what a template writes around messages, from words that say nothing, once for each sequence of roles.

Where a turn begins and ends, which tokens are the template's own and which a reply is to be learned by, follows from
the roles of a conversation alone. So a conversation of harmless words shows it, and real ones are held against that.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from e2p_jax.data.control import Groups, guard
from e2p_jax.data.template import reason
from e2p_jax.errors import UserError

Messages = Sequence[dict[str, Any]]
# What each turn of a conversation is: its role, and what it holds beside text (`assistant+thought+call`); `tools` in
# front where there are any.
Kinds = tuple[str, ...]

EXCHANGE: Kinds = ("user", "assistant")
_DIALOGUE = (*EXCHANGE, *EXCHANGE)
_OTHERS: tuple[Kinds, ...] = (("system", *EXCHANGE), (*EXCHANGE, "user"), (*EXCHANGE, "assistant"), ("assistant",))
_FOLD = Path(__file__).parent / "fold.jinja"


class Rendered(NamedTuple):
    """A conversation as text and as tokens."""

    text: str
    spans: list[tuple[int, int]]  # characters between generation markers
    ids: np.ndarray  # [n] int32
    offsets: np.ndarray  # [n, 2]: characters of each token

    def token_at(self, place: int) -> int:
        """The first token that reaches beyond a character; n where none does."""
        return int(np.count_nonzero(self.offsets[:, 1] <= place))


class Reply(NamedTuple):
    """The marked text around the words of one assistant turn, which is learned with them."""

    lead: str  # in front of them
    end: str  # after them


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of all conversations with the same kinds of turns."""

    rendered: Rendered
    places: list[int]  # where each message's first word is; -1 where one of its words is not, or more than once
    replies: list[Reply | None]  # of the assistant turns; None: not marked as such
    words: list[list[str]]  # of each message, as they follow each other
    unseen: str  # of tools, calls and thoughts: what is not shown


def kinds_of(messages: Messages, tools: Sequence[Any] = ()) -> Kinds:
    """The kinds of a conversation's turns."""
    return (*(("tools",) if tools else ()), *map(_kind, messages))


def _kind(message: dict[str, Any]) -> str:
    if len(message) == 2:
        return str(message["role"])
    thought = "+thought" if "reasoning_content" in message else ""
    calls = message.get("tool_calls", ())
    more = "+call" * len(calls) + "+id" * ("tool_call_id" in message or any("id" in call for call in calls))
    return message["role"] + thought + ("" if message["content"] else "+silent") + more + "+name" * ("name" in message)


class Calling(NamedTuple):
    """How a template takes tool calls."""

    silence: str | None  # the content of a turn that holds nothing else
    encoded: bool  # the arguments are JSON, as text

    def write(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message of a record as the template takes it."""
        calls = message["tool_calls"]
        if self.encoded:
            functions = [(call, call["function"]) for call in calls]
            calls = [c | {"function": f | {"arguments": json.dumps(f["arguments"])}} for c, f in functions]
        return message | {"content": message["content"] or self.silence, "tool_calls": calls}


_CALLINGS = tuple(Calling(silence, encoded) for encoded in (False, True) for silence in ("", None))


class Structure:
    """A template's, found out as it is asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, source: str):
        """
        Args:
          template: with generation markers.
          source: what to call it in errors.
        """
        self.tokenizer, self.template, self.source = tokenizer, template, source
        self.guarded = template
        self.folds = False  # a system message goes into the first user turn
        self.shape = functools.cache(self._shape)
        tokenizer("", verbose=False)  # transformers tells its backend to cut and to pad nothing

    def guard(self, groups: Groups, policy: str) -> None:
        """From now on messages are rendered by the template that keeps text from becoming control tokens, and takes
        system messages.
        """
        systems = (("system", *EXCHANGE), ("system", *_DIALOGUE))
        self.folds = not all(map(self._shows_system, systems))
        self.guarded = guard(self.template, groups, policy, _FOLD.read_text(encoding="utf-8") if self.folds else "")
        self.shape.cache_clear()

    def _shows_system(self, kinds: Kinds) -> bool:
        shape = self.find_shape(kinds, False)
        return shape is not None and shape.words[0][0] in shape.rendered.text and self.fault(kinds) is None

    @functools.cached_property
    def calling(self) -> "Calling":
        """How the template takes tool calls: the first way in which it shows them."""
        for calling in _CALLINGS:
            shape = self._tried(("user", "assistant+silent+call"), False, calling)
            if shape is not None and not shape.unseen:
                return calling
        return _CALLINGS[0]

    @functools.cached_property
    def thoughts_end(self) -> str:
        """What a decoded reply has between thoughts and answer; empty if it shows none."""
        shape = self.find_shape(("user", "assistant+thought"), False)
        if shape is None or -1 in shape.places:
            return ""
        thought, answer = shape.words[1]
        between = shape.rendered.text.partition(thought)[2].partition(answer)[0]
        ids = self.tokenizer(between, add_special_tokens=False)["input_ids"]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def render(self, messages: Messages, tools: Sequence[dict[str, Any]] = (), *, prompt: bool) -> Rendered:
        """As `apply_chat_template` renders and tokenises it under `guarded`.

        Raises:
          Exception: whatever the template raises.
        """
        special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=self.guarded,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **special,
        )
        (text,), (spans,) = rendered
        # Past what transformers does around it, which takes six times as long for a short prompt.
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
        return Rendered(text, spans, np.asarray(encoded.ids, np.int32), offsets)

    def _shape(self, kinds: Kinds, prompt: bool = False, calling: "Calling | None" = None) -> Shape:
        """
        Raises:
          Exception: whatever the template raises.
        """
        fresh = map(_word, itertools.count())
        tools = [_tool(next(fresh))] if kinds[:1] == ("tools",) else []
        said = [_message(kind, fresh, calling) for kind in kinds[len(tools) :]]
        rendered = self.render([message for message, _ in said], tools, prompt=prompt)
        words = [[word for word, _ in shown] for _, shown in said]
        called = {call["function"]["name"] for message, _ in said for call in message.get("tool_calls", ())}

        def shows(word: str) -> bool:
            """Once; but what a tool says may name it again."""
            count = rendered.text.count(word)
            return count == 1 or (count > 1 and word in called)

        once = [all(map(shows, spoken)) for spoken in words]
        places = [rendered.text.index(w[0]) if there else -1 for w, there in zip(words, once, strict=True)]
        replies = [_reply(rendered, places, words, n) for n, (m, _) in enumerate(said) if m["role"] == "assistant"]
        asked = [(tool["function"]["name"], "`tools`") for tool in tools]
        asked += [pair for _, shown in said for pair in shown]
        unseen = next((what for word, what in asked if what and word not in rendered.text), "")
        return Shape(rendered, places, replies, words, unseen)

    def find_shape(self, kinds: Kinds, prompt: bool) -> Shape | None:
        """None where the template refuses such conversations, or words that say nothing."""
        return self._tried(kinds, prompt, self.calling if any("+call" in kind for kind in kinds) else None)

    def _tried(self, kinds: Kinds, prompt: bool, calling: "Calling | None") -> Shape | None:
        try:
            return self.shape(kinds, prompt, calling)
        except Exception:
            return None

    def written(self) -> set[int]:
        """Ids of the tokens that the template writes beside the words of messages."""
        tried = (self.find_shape(roles, p) for roles in (EXCHANGE, _DIALOGUE, *_OTHERS) for p in (False, True))
        return {number for shape in tried if shape is not None for number in shape.rendered.ids.tolist()}

    def check(self) -> None:
        """
        Raises:
          UserError: its targets are not what follows the generation prompt, up to and with the end of the turn.
        """
        try:
            first, prompt, silent = self.shape(EXCHANGE), self.shape(("user",), True), self.shape(("user",))
        except Exception as error:
            raise UserError(f"{self.source}: the chat template cannot be used ({reason(error)}); {_REMEDY}") from error
        fault = self.fault(EXCHANGE) or self.fault(_DIALOGUE)
        if fault is None:
            lead = first.replies[0]
            assert lead is not None
            start = first.places[1] - len(lead.lead)
            if lead.lead.strip() and prompt.rendered.text == silent.rendered.text:
                fault = f"it has no generation prompt, so that {lead.lead!r} would be learned as part of the reply"
            elif first.rendered.text[:start] != prompt.rendered.text:
                fault = "its targets do not begin where its generation prompt ends"
        if fault is not None:
            raise UserError(f"{self.source}: the chat template would give wrong targets ({fault}); {_REMEDY}")

    def fault(self, kinds: Kinds) -> str | None:
        """Why targets of conversations of these kinds would be wrong; None where they are right."""
        shape = self.find_shape(kinds, False)
        if shape is None:
            return "it does not take words that say nothing, so that its targets cannot be checked"
        usual = self.shape(EXCHANGE).replies[0]
        turns = [place for place, kind in enumerate(kinds) if kind.startswith("assistant")]
        for place, reply in zip(turns, shape.replies, strict=True):
            if reply is None or usual is None:
                return "not every reply is marked, once and whole"
            if kinds[place] == "assistant" and reply.lead != usual.lead:
                return (
                    f"the reply to a question begins with {usual.lead!r}, another one here with {reply.lead!r}, which "
                    "would be learned as part of it"
                )
            if kinds[place] != "assistant" and not self._follows(shape, kinds, place, reply):
                return "a reply with thoughts or tool calls is not marked from where its generation prompt ends"
            calls = "+call" in kinds[place] and self._special_end(reply.end) is not None
            if not (calls or reply.end.endswith(usual.end)) or (kinds[place] == "assistant" and reply.end != usual.end):
                return f"a reply ends with {reply.end!r} in one place and with {usual.end!r} in another"
        return None

    def _follows(self, shape: Shape, kinds: Kinds, place: int, reply: Reply) -> bool:
        """Tells whether a turn's targets begin where the prompt for it ends."""
        asked = self.find_shape(kinds[:place], True)
        begin = shape.places[place - kinds.count("tools")] - len(reply.lead)
        return asked is not None and asked.rendered.text == shape.rendered.text[:begin]

    def opener(self, kinds: Kinds) -> str:
        """What is written after turns of these kinds to open a reply: the generation prompt."""
        usual: Kinds = EXCHANGE[:1]
        kinds = usual if kinds[-1:] == usual else kinds
        asked, silent = self.find_shape(kinds, True), self.find_shape(kinds, False)
        if asked is None or silent is None:  # a template may refuse a conversation that begins with a reply
            return self.opener(usual)
        text, other = asked.rendered.text, silent.rendered.text
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
        return text[len(list(same)) :]

    def late_end(self, controls: set[int]) -> str | None:
        """The control token that ends a reply only when another turn follows, if there is one.

        It follows the reply's words and is none of its targets, and it is not what opens a conversation's first turn.
        """
        last, followed = self.shape(EXCHANGE), self.find_shape((*EXCHANGE, "user"), False)
        if followed is None or self.ends(controls) or -1 in followed.places[1:]:
            return None
        begin, end = followed.places[1] + len(followed.words[1][0]), followed.places[2]
        after = _within(followed.rendered, begin, end, controls)
        opening = [i for i in _within(last.rendered, 0, last.places[0], controls) if i != self.tokenizer.bos_token_id]
        if not after or after[0] in (self.tokenizer.bos_token_id, *opening[:1]):
            return None
        return str(self.tokenizer.convert_ids_to_tokens(after[0]))

    def ends(self, controls: set[int]) -> list[int]:
        """Control tokens among the targets after a reply's words: what ends a trained turn is the last of them."""
        shape = self.shape(EXCHANGE)
        begin = shape.places[1] + len(shape.words[1][0])
        reply = shape.replies[0]
        return _within(shape.rendered, begin, begin + len(reply.end), controls) if reply else []

    def call_end(self) -> int | None:
        """The special token that ends a turn which calls a tool, where the template shows calls."""
        shape = self.find_shape(("user", "assistant+silent+call"), False)
        reply = None if shape is None or shape.unseen else shape.replies[0]
        return None if reply is None else self._special_end(reply.end)

    def _special_end(self, text: str) -> int | None:
        added = self.tokenizer.added_tokens_decoder.items()
        return next((number for number, token in added if token.special and text.endswith(token.content)), None)

    def last_target(self) -> int:
        """The last token of a reply to a question."""
        shape = self.shape(EXCHANGE)
        _, end = shape.rendered.spans[-1]
        inside = np.flatnonzero(shape.rendered.offsets[:, 0] < end)
        return int(shape.rendered.ids[inside[-1]])


_REMEDY = (
    "set data.chat_template to a copy of it with {% generation %} ... {% endgeneration %} around assistant turns, "
    "their end included and their header not"
)


def unused_word(texts: Sequence[str]) -> str:
    """A word that is in none of the texts."""
    return next(word for word in map(_word, itertools.count()) if not any(word in text for text in texts))


def _word(number: int) -> str:
    return f"zqx{_letters(number)}jv"


def _letters(number: int) -> str:
    """A, b, ..., z, ba, ...: a number without digits, which tokenizers and templates may treat apart."""
    text = chr(ord("a") + number % 26)
    return text if number < 26 else _letters(number // 26) + text


def _within(rendered: Rendered, begin: int, end: int, controls: set[int]) -> list[int]:
    """The control tokens that begin between two characters."""
    firsts = rendered.offsets[:, 0]
    chosen = rendered.ids[(firsts >= begin) & (firsts < end)]
    return [number for number in chosen.tolist() if number in controls]


def _message(kind: str, fresh: Iterator[str], calling: Calling | None) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A message of a kind, and its words with what it means that one is not shown, if that is a fault."""
    role, *more = kind.split("+")
    message: dict[str, Any] = {"role": role, "content": ""}
    words = []
    if "thought" in more:
        message["reasoning_content"] = next(fresh)
        words.append((message["reasoning_content"], "thoughts (reasoning_content)"))
    if "silent" not in more:
        message["content"] = next(fresh)
        beside = "text beside tool calls" if "call" in more else ""
        words.append((message["content"], "what a tool says (role tool)" if role == "tool" else beside))
    calls = []
    for number in range(more.count("call")):
        name, argument, value = itertools.islice(fresh, 3)
        call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": {argument: value}}}
        calls.append(call | {"id": f"zqxcall{number:02}"} if "id" in more else call)
        words += [(word, "tool calls") for word in (name, argument, value)]
    if calls:
        message = (calling or _CALLINGS[0]).write(message | {"tool_calls": calls})
    elif "id" in more:
        message["tool_call_id"] = "zqxcall00"
    if "name" in more:
        message["name"] = next(fresh)
    return message, words


def _tool(word: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": word, "description": "", "parameters": schema}}


def _reply(rendered: Rendered, places: list[int], words: list[list[str]], number: int) -> Reply | None:
    """Finds what is marked around the words of one message."""
    place, last_word = places[number], words[number][-1]
    end = rendered.text.find(last_word) + len(last_word)
    held = [span for span in rendered.spans if span[0] <= place and end <= span[1]]
    if place < 0 or len(held) != 1:
        return None
    (first, last), others = held[0], [p for n, p in enumerate(places) if n != number]
    if any(first <= other < last for other in others):
        return None
    for span in rendered.spans:  # the end of the turn may be marked by itself
        if span[0] == last and not any(span[0] <= other < span[1] for other in others):
            last = span[1]
    return Reply(rendered.text[first:place], rendered.text[end:last])
