"""Learns what a template writes around messages, from words that say nothing, once for each sequence of roles.

Where a turn begins and ends, which tokens are the template's own and which a reply is to be learned by, follows from
the roles of a conversation alone. So a conversation of harmless words shows it, and real ones are held against that.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from e2p_jax.data.control import Groups, guard
from e2p_jax.data.template import reason
from e2p_jax.errors import UserError

Messages = Sequence[dict[str, str]]
Roles = tuple[str, ...]

EXCHANGE: Roles = ("user", "assistant")
_DIALOGUE = (*EXCHANGE, *EXCHANGE)
_OTHERS: tuple[Roles, ...] = (("system", *EXCHANGE), (*EXCHANGE, "user"), (*EXCHANGE, "assistant"), ("assistant",))


class Rendered(NamedTuple):
    """A conversation as text and as tokens."""

    text: str
    spans: list[tuple[int, int]]  # characters between generation markers
    ids: np.ndarray  # [n] int32
    offsets: np.ndarray  # [n, 2]: characters of each token


class Reply(NamedTuple):
    """The marked text around the words of one assistant turn, which is learned with them."""

    lead: str  # in front of them
    end: str  # after them


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of all conversations with the same roles."""

    rendered: Rendered
    places: list[int]  # where each message's word is; -1 where it is not, or more than once
    replies: list[Reply | None]  # of the assistant turns; None: not marked as such
    words: list[str]


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
        self.shape = functools.cache(self._shape)

    def guard(self, groups: Groups, policy: str) -> None:
        """From now on messages are rendered by the template that keeps their text from becoming control tokens."""
        self.guarded = guard(self.template, groups, policy)

    def render(self, messages: Messages, *, prompt: bool) -> Rendered:
        """As `apply_chat_template` renders and tokenises it under `guarded`.

        Raises:
          Exception: whatever the template raises.
        """
        special: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.guarded,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **special,
        )
        (text,), (spans,) = rendered
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], np.int32)
        return Rendered(text, spans, ids, np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2))

    def _shape(self, roles: Roles, prompt: bool = False) -> Shape:
        """
        Raises:
          Exception: whatever the template raises.
        """
        words = [f"zqx{_letters(number)}jv" for number in range(len(roles))]
        messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        rendered = self.render(messages, prompt=prompt)
        places = [rendered.text.index(word) if rendered.text.count(word) == 1 else -1 for word in words]
        replies = [_reply(rendered, places, words, n) for n, role in enumerate(roles) if role == "assistant"]
        return Shape(rendered, places, replies, words)

    def find_shape(self, roles: Roles, prompt: bool) -> Shape | None:
        """None where the template refuses such conversations, or words that say nothing."""
        try:
            return self.shape(roles, prompt)
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

    def fault(self, roles: Roles) -> str | None:
        """Why targets of conversations with these roles would be wrong; None where they are right."""
        shape = self.find_shape(roles, False)
        if shape is None:
            return "it does not take words that say nothing, so that its targets cannot be checked"
        usual = self.shape(EXCHANGE).replies[0]
        for reply in shape.replies:
            if reply is None or usual is None:
                return "not every reply is marked, once and whole"
            if reply.lead != usual.lead:
                return (
                    f"the reply to a question begins with {usual.lead!r}, another one here with {reply.lead!r}, which "
                    "would be learned as part of it"
                )
            if reply.end != usual.end:
                return f"a reply ends with {reply.end!r} in one place and with {usual.end!r} in another"
        return None

    def late_end(self, controls: set[int]) -> str | None:
        """The control token that ends a reply only when another turn follows, if there is one.

        It follows the reply's words and is none of its targets, and it is not what opens a conversation's first turn.
        """
        last, followed = self.shape(EXCHANGE), self.find_shape((*EXCHANGE, "user"), False)
        if followed is None or self.ends(controls) or -1 in followed.places[1:]:
            return None
        begin, end = followed.places[1] + len(followed.words[1]), followed.places[2]
        after = _within(followed.rendered, begin, end, controls)
        opening = [i for i in _within(last.rendered, 0, last.places[0], controls) if i != self.tokenizer.bos_token_id]
        if not after or after[0] in (self.tokenizer.bos_token_id, *opening[:1]):
            return None
        return str(self.tokenizer.convert_ids_to_tokens(after[0]))

    def ends(self, controls: set[int]) -> list[int]:
        """Control tokens among the targets after a reply's words: what ends a trained turn is the last of them."""
        shape = self.shape(EXCHANGE)
        begin = shape.places[1] + len(shape.words[1])
        reply = shape.replies[0]
        return _within(shape.rendered, begin, begin + len(reply.end), controls) if reply else []

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
    number = 0
    while any(f"zqx{_letters(number)}jv" in text for text in texts):
        number += 1
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


def _reply(rendered: Rendered, places: list[int], words: list[str], number: int) -> Reply | None:
    """Finds what is marked around the word of one message, up to the words beside it."""
    place, end = places[number], places[number] + len(words[number])
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
