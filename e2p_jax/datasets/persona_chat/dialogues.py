"""A dialogue of Persona-Chat, whichever of its published forms it was read from, and the records it makes."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from e2p_jax.datasets.records import Record

Whose = Literal["self", "other", "both"]


class Turn(NamedTuple):
    """A saying of the partner, and the reply."""

    partner: str
    reply: str
    candidates: tuple[str, ...] = ()  # the reply first; empty where the file has none


class Dialogue(NamedTuple):
    """Two people talk; the replies are by the owner of `persona`."""

    number: int  # in its file, from 0
    persona: tuple[str, ...]
    partner: tuple[str, ...]  # the partner's persona
    turns: tuple[Turn, ...]
    source: str  # file and row, for errors

    def context(self, whose: Whose) -> tuple[str, ...]:
        """Says what is known of the one who replies, the one replied to, or both, each sentence labelled."""
        if whose == "self":
            return self.persona
        if whose == "other":
            return self.partner
        return (*(f"my persona: {s}" for s in self.persona), *(f"partner's persona: {s}" for s in self.partner))

    def record(self, whose: Whose, turns: int | None = None) -> Record:
        """The dialogue, or its first `turns` turns; the candidates are those of the last one."""
        kept = self.turns[:turns]
        messages = [
            message
            for turn in kept
            for message in ({"role": "user", "content": turn.partner}, {"role": "assistant", "content": turn.reply})
        ]
        context = self.context(whose)
        return Record(user_id(context), context, tuple(messages), kept[-1].candidates, source=self.source)

    def rankings(self, whose: Whose) -> Iterator[Record]:
        """One record for every turn that has candidates: published Hits@1 is over all turns."""
        for count, turn in enumerate(self.turns, 1):
            if turn.candidates:
                yield self.record(whose, count)


def user_id(persona: Sequence[str]) -> str:
    """Names the user who has these persona sentences, in any order."""
    return hashlib.sha256("\n".join(sorted(set(persona))).encode()).hexdigest()[:16]


def pair(said: Sequence[tuple[bool, str]]) -> tuple[Turn, ...]:
    """(whether it is a reply, text) in turn -> turns; what one says in a row is one text.

    Chat templates want a user turn first and an answer last: a reply that opens the dialogue, and what stands
    unanswered at its end, are left out.
    """
    merged: list[tuple[bool, str]] = []
    for mine, text in said:
        if merged and merged[-1][0] == mine:
            merged[-1] = (mine, f"{merged[-1][1]} {text}")
        elif merged or not mine:
            merged.append((mine, text))
    return tuple(Turn(partner, reply) for (_, partner), (_, reply) in zip(merged[::2], merged[1::2], strict=False))
