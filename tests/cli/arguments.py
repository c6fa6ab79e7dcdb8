"""Arguments of a short training on one's own data."""

import json
from pathlib import Path

USERS = range(30)


def train_arguments(place: Path, backbone: Path, workdir: Path, *more: str) -> list[str]:
    paths = ["--backbone.path", backbone, "--data.path", place / "records.jsonl", "--data.embeddings", place / "table"]
    small = "--data.seq_len 128 --train.rows 4 --train.steps 4 --train.warmup_steps 1 --projector.hidden_size 16"
    quiet = "--train.eval_every 2 --train.checkpoint_every 2"
    return ["train", "persona_chat", "--workdir", str(workdir), *map(str, paths), *small.split(), *quiet.split(), *more]


def lines_of(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "records.jsonl").read_text().splitlines()]
