"""Persona-Chat's training dialogues with made-up users beside them, who tell their persona: a vector learns to be read.

    python benchmarks/reconstruction.py data/persona_chat/self_original/1.0.0 mixed.jsonl --users 6000 \
      --corpus self_dialogue.jsonl.gz

A made-up user has four or five sentences of training users, or of a corpus of people's dialogues (lines of JSON with
`turns`), each told once before any is told again, and one turn: asked who they are, they say them in order. So does
every training user. The dialogues alone are there again as split `dialogues`. No sentence of a user of `validation` or
of those who pick the checkpoint (split `picks`, chosen as `data.dev_split=auto` does) is among them. `e2p embed --data
mixed.jsonl --encoder MODEL --blocks 4` makes the vectors.
"""

import dataclasses
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

from e2p_jax.datasets.prepared import load_splits
from e2p_jax.datasets.records import Record, hold_out
from e2p_jax.files import write_text

QUESTIONS = ("tell me about yourself .", "who are you ?", "what do you like ?", "what should i know about you ?")
FIRST_PERSON = re.compile(r"^(i|my|i'm|i've|we) ", re.IGNORECASE)
ABOUT = re.compile(
    r"\b(love|like|enjoy|favorite|work|live|have|play|listen|watch|read|hate|grew|born|married|kids|dog|cat|job|school|"
    r"college|used to|want|hobby|family|wife|husband|mother|father|sister|brother)\b"
)
POINTS_ELSEWHERE = re.compile(r"\b(it|that|this|them|they|he|she|him|her|you|one|those|these)\b")


def sentences_of(corpus: Path) -> set[str]:
    """What people say of themselves, 5 to 14 words, that can be understood alone."""
    found = set()
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        for turn in itertools.chain.from_iterable(json.loads(line)["turns"] for line in lines):
            for said in re.split(r"(?<=[.!?])\s+", turn):
                text = said.lower().rstrip(".!?") + "."
                if (
                    5 <= len(text.split()) <= 14
                    and text.isascii()
                    and FIRST_PERSON.match(text)
                    and ABOUT.search(text)
                    and not POINTS_ELSEWHERE.search(text)
                ):
                    found.add(text)
    return found


def shuffled_again_and_again(pool: list[str], rng: np.random.Generator) -> Iterator[str]:
    """All of the pool in random order, then all in another."""
    while True:
        yield from (pool[place] for place in rng.permutation(len(pool)))


def main(prepared: str, out: Path, /, users: int = 6000, corpus: Path | None = None, seed: int = 0) -> None:
    """Writes the records.

    Args:
      prepared: directory that `e2p prepare persona_chat` wrote.
      out: JSON Lines file to write.
      users: made-up ones.
      corpus: gzipped lines of JSON with `turns`; half of the made-up users are of its sentences.
      seed: of the draws.
    """
    splits = load_splits(prepared, ["train", "validation", "validation_seen"])
    reported = {record.user_id for name in ("validation", "validation_seen") for record in splits[name]}
    picked = hold_out(record.user_id for record in splits["train"] if record.user_id not in reported)
    train = [record for record in splits["train"] if not picked(record.user_id)]
    splits["picks"] = [record for record in splits["train"] if picked(record.user_id)]
    held = {text for name in ("validation", "picks") for record in splits[name] for text in record.context}
    pools = [sorted({text for record in train for text in record.context} - held)]
    if corpus:
        pools.append(sorted(sentences_of(corpus) - held))
    rng = np.random.default_rng(seed)
    drawn = [shuffled_again_and_again(pool, rng) for pool in pools]
    personas = {record.user_id: record.context for record in train}
    for user in range(users):
        source = drawn[int(rng.integers(len(drawn)))]
        personas[f"made-up-{user}"] = tuple(itertools.islice(source, int(rng.integers(4, 6))))
    splits |= {"dialogues": train}
    splits["train"] = train + [
        Record(
            user,
            context,
            (
                {"role": "user", "content": QUESTIONS[int(rng.integers(len(QUESTIONS)))]},
                {"role": "assistant", "content": " ".join(context)},
            ),
        )
        for user, context in personas.items()
    ]
    lines = []
    for split, records in splits.items():
        for record in records:
            values = {name: value for name, value in dataclasses.asdict(record).items() if value and name != "source"}
            lines.append(json.dumps(values | {"context": record.context, "split": split}, ensure_ascii=False))
    write_text(out, "\n".join(lines) + "\n")
    print({split: len(records) for split, records in splits.items()}, [len(pool) for pool in pools])


if __name__ == "__main__":
    tyro.cli(main)
