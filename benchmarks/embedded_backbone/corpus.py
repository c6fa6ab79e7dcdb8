"""The embedded backbone's training text: real dialogues and generated ones, many with a context in front.

    python benchmarks/embedded_backbone/corpus.py --sources DIR --out corpus.jsonl

A small decoder only learns to look back at its context when that pays. So three in four real dialogues get a system
message made of sentences and rare words of their own later assistant turns (among others that do not belong),
generated personas answer what cannot be guessed without theirs, and some dialogues repeat themselves. Two in five,
real or generated, have their punctuation set apart by spaces, as published dialogue sets often do.

Sources (JSON Lines, gzip, with a list `turns`): self_dialogue.jsonl.gz, the Edina self-dialogue corpus (Fainberg et
al., 2018, BSD 3-Clause); schema_guided.jsonl.gz, Schema-Guided Dialogue (Rastogi et al., 2020, CC BY-SA 4.0).
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.files import write_text
from e2p_jax.text_files import Line, decode_json, read_lines

SOURCES = {"self_dialogue.jsonl.gz": 0.6, "schema_guided.jsonl.gz": 0.1}  # file -> share of it that is used
VALIDATION_SHARE = 0.01
SPACED_SHARE = 0.4
LONGEST_TURN = 40  # words


def main(sources: Path, out: Path) -> None:
    """Writes the corpus as records; the key `split` says which are `validation`, one dialogue in a hundred.

    Args:
      sources: Directory of the source files.
      out: JSON Lines file to write.
    """
    lines = [
        json.dumps({"user_id": r.user_id, "context": r.context, "messages": r.messages, "split": split})
        for r, split in records(sources)
    ]
    write_text(out, "\n".join(lines) + "\n")


def source_files(directory: Path) -> list[Path]:
    """The source files.

    Raises:
      UserError: naming the file that is missing.
    """
    paths = [directory / name for name in SOURCES]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"{', '.join(missing)}: not found; the dialogue corpus needs {' and '.join(SOURCES)}")
    return paths


def records(directory: Path, seed: int = 0) -> Iterator[tuple[Record, str]]:
    """Yields each record and its split, in a mixed, repeatable order.

    Raises:
      UserError: a source file is missing from `directory`, damaged, or has a malformed line.
    """
    bad = BadRecords()
    rng = np.random.default_rng(seed)
    dialogues = []
    for path, share in zip(source_files(directory), SOURCES.values(), strict=True):
        every = bad.parse(read_lines(path), _turns, path)
        dialogues += [turns for turns in every if len(turns) > 3 and _short(turns) and rng.random() < share]
    counts = collections.Counter(word for turns in dialogues for turn in turns for word in set(_words(turn)))
    people = list(synthetic.PRETRAINING)
    items: list[list[str] | int] = [*dialogues, *people]
    for position in rng.permutation(len(items)):
        item = items[int(position)]
        held_out = rng.random() < VALIDATION_SHARE
        if isinstance(item, int):
            record = _with_persona(synthetic.record(item), rng)
        else:
            other = dialogues[int(rng.integers(len(dialogues)))]
            record = _with_extracts(item, other, counts, rng, f"dialogue {position}")
        if rng.random() < SPACED_SHARE:
            record = _spaced(record)
        yield record, "validation" if held_out else "train"


def _turns(line: Line) -> list[str]:
    values = decode_json(line)
    turns = values.get("turns") if isinstance(values, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{line.place}: must be a JSON object with a list of texts `turns`")
    return [turn.strip() for turn in turns]


def _short(turns: list[str]) -> bool:
    """Every turn says something, and an exchange with its context fits in the 256 tokens the backbone trains on."""
    return all(0 < len(turn.split()) <= LONGEST_TURN for turn in turns)


def _spaced(record: Record) -> Record:
    """The record with a space before every mark of punctuation."""

    def space(text: str) -> str:
        return re.sub(r"(?<=\w)([.,!?;]+)(?=\s|$)", r" \1", text)

    messages = tuple({**message, "content": space(message["content"])} for message in record.messages)
    return dataclasses.replace(record, context=tuple(map(space, record.context)), messages=messages)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]{4,}", text.lower())


def _with_persona(record: Record, rng: np.random.Generator) -> Record:
    """Seven in eight generated dialogues show their persona: as sentences, or as bare words."""
    form = rng.random()
    if form < 0.125:
        return record
    if form < 0.75:
        context = list(record.context)
    else:
        context = [" ".join(synthetic.traits(int(record.user_id.removeprefix("user-"))).values())]
    rng.shuffle(context)
    system = {"role": "system", "content": "\n".join(context)}
    return Record(record.user_id, tuple(context), (system, *record.messages), source=record.source)


def _with_extracts(
    turns: list[str], other: list[str], counts: collections.Counter, rng: np.random.Generator, source: str
) -> Record:
    """A real dialogue; three in four with extracts of their own assistant turns as context, one in ten an echo."""
    if rng.random() < 0.1:
        turns = [turn for turn in turns[::2] for _ in range(2)]  # the assistant repeats every turn
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    context: list[str] = []
    if rng.random() < 0.75:
        replies = turns[1::2]
        rare = sorted({w for reply in replies for w in _words(reply)}, key=lambda w: counts[w])[:6]
        if rng.random() < 0.5 and rare:
            chosen = [str(w) for w in rng.permutation(rare)[: int(rng.integers(1, len(rare) + 1))]]
            context = [" ".join(chosen)]
        else:
            chosen = [str(r) for r in rng.permutation(np.array(replies, object))[: int(rng.integers(1, 4))]]
            strangers = [str(r) for r in rng.permutation(np.array(other, object))[: int(rng.integers(0, 3))]]
            context = [text for text in chosen + strangers if len(text.split()) <= 15]
            rng.shuffle(context)
    if context:
        messages.insert(0, {"role": "system", "content": "\n".join(context)})
    return Record(source, tuple(context), tuple(messages), source=source)


if __name__ == "__main__":
    tyro.cli(main)
