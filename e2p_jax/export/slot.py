"""Tells an exported model, which sees token ids alone, how to find the place of `in_chat` soft tokens.

The text of a message never gives a control token, so a header that begins with one is found in any conversation. A
header of plain text can be spelt out by a system message: there, only a conversation that begins with the user's turn
is served.
"""

import contextlib
import itertools
from typing import Any, NamedTuple

import numpy as np

from e2p_jax.data.encode import Encoder
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError

_BEFORE = (("system", "be kind"), ("system", "What next?"), ("system", "two\nlines.\n"), ("assistant", "yes."))
_QUESTIONS = ("hi", "Why?", "7 days", "(so)", "\u00e9t\u00e9", "\U0001f600", " a space", "\na line", "\n\n\ttwo")


class Probe(NamedTuple):
    """A conversation without its slots."""

    ids: list[int]
    start: int  # where the slots were


def user_turn(encoder: Encoder) -> dict[str, Any]:
    """Gives what the exported config says of the place.

    Returns:
      `ids`: what tells the header of a user's turn from all else; the first that a prompt holds counts. `tail`: the
      rest of the header, as far as the tokenizer does not join it to the text that follows. `opening`: only the very
      beginning of a prompt counts.

    Raises:
      UserError: the template opens user turns in a way that is not found among the ids.
    """
    alone = [_probe(encoder, text) for text in _QUESTIONS]
    later = []
    for before in _BEFORE:
        with contextlib.suppress(UserError):  # a conversation that the template refuses is none that it has to find
            later += [_probe(encoder, text, before) for text in _QUESTIONS]
    longest = max(alone, key=lambda probe: probe.start)  # nothing of the header was joined to the text
    opening, controls = longest.ids[: longest.start], set(encoder.controls.values())
    for first in reversed(range(len(opening))):
        if opening[first] in controls:
            turn = _fits(opening[first:], controls, alone + later, [], opening=False)
            if turn is not None:
                return turn
    with contextlib.suppress(UserError):  # a system message that spells the header out
        later.append(
            _probe(encoder, "hi", ("system", f"{encoder.tokenizer.decode(opening, skip_special_tokens=True)}x"))
        )
    turn = _fits(opening, controls, alone, later, opening=True)
    if turn is not None:
        return turn
    raise UserError(
        "prefix.placement=in_chat: this chat template opens user turns in more than one way; use before_bos or "
        "after_bos"
    )


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


def _probe(encoder: Encoder, text: str, before: tuple[str, str] | None = None) -> Probe:
    said = [before, ("user", text)] if before else [("user", text)]
    messages = tuple({"role": role, "content": content} for role, content in said)
    example = encoder.encode_prompt(Record("probe", (), messages, source="the export's probe"), "e2p")
    slots = range(example.slot_start, example.slot_start + encoder.num_tokens)
    return Probe(np.delete(example.tokens, slots).tolist(), example.slot_start)
