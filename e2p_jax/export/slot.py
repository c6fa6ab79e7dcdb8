"""Tells an exported model, which sees token ids alone, how to find the place of `in_chat` and `before_reply` tokens.

The text of a message never gives a control token, so a header that begins with one is found in any conversation. A
header of plain text can be spelt out by a message: there, `in_chat` serves only a conversation that begins with the
user's turn, and `before_reply` is refused.
"""

import contextlib
import itertools
from typing import Any, NamedTuple

import numpy as np

from e2p_jax.data.encode import Encoder
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError

_BEFORE = (
    *({"role": "system", "content": text} for text in ("be kind", "What next?", "two\nlines.\n")),
    {"role": "assistant", "content": "yes."},
)
_QUESTIONS = ("hi", "Why?", "7 days", "(so)", "\u00e9t\u00e9", "\U0001f600", " a space", "\na line", "\n\n\ttwo")


class Probe(NamedTuple):
    """A conversation without its slots."""

    ids: list[int]
    starts: list[int]  # where the slots were

    @property
    def start(self) -> int:
        """The first of them."""
        return self.starts[0]


def user_turn(encoder: Encoder) -> dict[str, Any]:
    """Gives what the exported config says of the place.

    Returns:
      `ids`: what tells the header of a user's turn from all else; the first that a prompt holds counts. `tail`: the
      rest of the header, as far as the tokenizer does not join it to the text that follows. `opening`: only the very
      beginning of a prompt counts.

    Raises:
      UserError: the template opens user turns in a way that is not found among the ids.
    """
    questions = [{"role": "user", "content": text} for text in _QUESTIONS]
    alone = [_probe(encoder, question) for question in questions]
    later = []
    for before in _BEFORE:
        with contextlib.suppress(UserError):  # a conversation that the template refuses is none that it has to find
            later += [_probe(encoder, before, question) for question in questions]
    longest = max(alone, key=lambda probe: probe.start)  # nothing of the header was joined to the text
    opening, controls = longest.ids[: longest.start], set(encoder.controls.values())
    for first in reversed(range(len(opening))):
        if opening[first] in controls:
            turn = _fits(opening[first:], controls, alone + later, [], opening=False)
            if turn is not None:
                return turn
    with contextlib.suppress(UserError):  # a system message that spells the header out
        forged = f"{encoder.tokenizer.decode(opening, skip_special_tokens=True)}x"
        later.append(_probe(encoder, {"role": "system", "content": forged}, questions[0]))
    turn = _fits(opening, controls, alone, later, opening=True)
    if turn is not None:
        return turn
    raise UserError("prefix.placement=in_chat: this chat template opens user turns in more than one way; use after_bos")


def reply_opening(encoder: Encoder) -> dict[str, Any]:
    """Gives what the exported config says of where replies open.

    Returns:
      `ids`: what stands where a reply opens, and nowhere else in a prompt. `offset`: how far into it soft tokens stand.

    Raises:
      UserError: the template opens replies in a way that is not found among the ids.
    """
    asked = _conversations(encoder)
    ids, place, controls = asked[0].ids, asked[0].starts[-1], set(encoder.controls.values())
    tried = [(ids[place:end], 0) for end in range(place + 1, len(ids) + 1)]  # what follows, else what goes before
    tried += [(ids[first:place], place - first) for first in reversed(range(place))]
    for pattern, offset in tried:
        if controls & set(pattern) and all(_openings(pattern, offset, probe.ids) == probe.starts for probe in asked):
            return {"ids": pattern, "offset": offset}
    raise UserError(
        "prefix.placement=before_reply: this chat template opens replies with plain text, which a message could spell "
        "out, or in more than one way; an exported model cannot tell where: use after_bos"
    )


def _openings(pattern: list[int], offset: int, ids: list[int]) -> list[int]:
    starts = [start for start in range(len(ids)) if ids[start : start + len(pattern)] == pattern]
    return [max(start + offset, 1) for start in starts]


def found(turn: dict[str, Any], ids: list[int], first: int) -> int:
    """The index of the slots in a prompt that begins at `first`, -1 where there is no such place."""
    starts = [first] if turn["opening"] else range(first, len(ids))
    for start in starts:
        end = start + len(turn["ids"])
        if ids[start:end] == turn["ids"]:
            joined = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids[end:], turn["tail"], strict=False))
            return end + len(list(joined))
    return -1


def _fits(
    header: list[int], controls: set[int], probes: list[Probe], others: list[Probe], *, opening: bool
) -> dict[str, Any] | None:
    """With as long a tail as finds the slots of `probes`, and none in `others`; the tail holds no control token."""
    shortest = max((place + 1 for place, number in enumerate(header) if number in controls), default=0)
    for cut in range(max(shortest, 1), len(header) + 1):
        turn = {"ids": header[:cut], "tail": header[cut:], "opening": opening}
        right = all(found(turn, probe.ids, 0) == probe.start for probe in probes)
        if right and all(found(turn, probe.ids, 0) < 0 for probe in others):
            return turn
    return None


def _conversations(encoder: Encoder) -> list[Probe]:
    """Prompts and whole conversations of all kinds that the template takes, a question alone first."""
    asked, kind = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}
    said = [{"role": "assistant", "content": text} for text in _QUESTIONS]
    talks: list[list[dict[str, Any]]] = [[asked], *([{"role": "user", "content": text}] for text in _QUESTIONS)]
    talks += [[asked, reply, asked] for reply in said]
    talks += [[kind, *talks[-1]], [*talks[-1], said[0], asked], [said[0], asked], [asked, asked], [asked, said[0]]]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    talks += [[asked, calling, {"role": "tool", "content": "wet"}]]
    if encoder.thoughts:
        said = [reply | {"reasoning_content": "so"} for reply in said]
        talks += [[asked, said[0], asked]]
    probes = [_probe(encoder, asked)]
    for talk in talks:
        for reply in (None, *said[:2])[talk[-1]["role"] == "assistant" :]:
            with contextlib.suppress(UserError):  # a conversation that the template refuses is none that it has to find
                probes.append(_probe(encoder, *talk, *((reply,) if reply else ()), whole=reply is not None))
    return probes


def _probe(encoder: Encoder, *messages: dict[str, Any], whole: bool = False) -> Probe:
    record = Record("probe", (), messages, source="the export's probe")
    example = encoder.encode(record, "e2p") if whole else encoder.encode_prompt(record, "e2p")
    places = example.slot_places(encoder.num_tokens)
    starts = places[:, 0] - encoder.num_tokens * np.arange(len(places))
    return Probe(np.delete(example.tokens, places).tolist(), starts.tolist())
