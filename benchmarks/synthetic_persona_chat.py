"""Splits Synthetic-Persona-Chat's released validation part, whose users all are of one split, for a trial.

    e2p prepare persona_chat/synthetic --manual-dir DIR --data-dir data
    python benchmarks/synthetic_persona_chat.py data/persona_chat/synthetic/1.0.0 data/synthetic_persona_chat.jsonl

`validation`: one user in eight, with all dialogues; `validation_seen`: the last dialogue of every other user who has
six or more; `train`: the rest, less the dialogues whose other side is in one of those.
"""

import collections
import hashlib
import json
from pathlib import Path

import tyro

from e2p_jax.datasets.prepared import load_records
from e2p_jax.datasets.records import Record
from e2p_jax.files import write_text


def is_held_out(user_id: str) -> bool:
    return hashlib.sha256(f"split {user_id}".encode()).digest()[0] < 256 / 8


def told(record: Record) -> set[str]:
    """Messages long enough that two dialogues do not share one by chance."""
    return {message["content"] for message in record.messages if len(message["content"]) > 40}


def main(prepared: str, out: Path, /) -> None:
    """Writes the records.

    Args:
      prepared: directory that `e2p prepare persona_chat/synthetic` wrote.
      out: JSON Lines file to write.
    """
    records = load_records(prepared, "validation")
    count = collections.Counter(record.user_id for record in records)
    last = {record.user_id: place for place, record in enumerate(records)}
    split = {}
    for place, record in enumerate(records):
        seen = place == last[record.user_id] and count[record.user_id] > 5
        split[place] = "validation" if is_held_out(record.user_id) else "validation_seen" if seen else "train"
    reported = {text for place, name in split.items() if name != "train" for text in told(records[place])}
    lines = []
    for place, record in enumerate(records):
        if split[place] != "train" or not told(record) & reported:
            fields = {name: getattr(record, name) for name in ("user_id", "context", "messages")}
            lines.append(json.dumps({**fields, "split": split[place]}, ensure_ascii=False) + "\n")
    write_text(out, "".join(lines))
    print(collections.Counter(json.loads(line)["split"] for line in lines))


if __name__ == "__main__":
    tyro.cli(main)
