"""A run goes on in another number of processes, and grows: no row of the epoch is lost, and none comes twice."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import until

from e2p_jax.config import Config
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.train.loop import read_data
from e2p_jax.train.setup import read_inputs
from e2p_jax.vectors.table import save_table

HERE = Path(__file__).parent
LAUNCH = HERE.parent.parent / "launch"
STEPS, ROWS = 16, 4


@pytest.fixture
def longer(config: Config, tmp_path: Path) -> Config:
    """An epoch and a part of the next."""
    users = range(56)
    write_jsonl([synthetic.record(user) for user in users], tmp_path / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in users])
    save_table(tmp_path / "table", [f"user-{user}" for user in users], vectors, name="synthetic", version="1")
    data = dataclasses.replace(config.data, path=str(tmp_path / "records.jsonl"), embeddings=str(tmp_path / "table"))
    settings = dataclasses.replace(config.train, steps=STEPS, rows=ROWS, eval_every=STEPS, checkpoint_every=STEPS)
    return dataclasses.replace(config, data=data, train=settings)


def rows_seen(files: list[Path]) -> list[dict[str, str]]:
    """Digests by row of the batch, step by step, of processes that ran together."""
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    assert len({len(each) for each in lines}) == 1
    steps = []
    for parts in zip(*lines, strict=True):
        assert sum(map(len, parts)) == ROWS, "a row of the batch is nobody's, or two processes'"
        steps.append({row: digest for part in parts for row, digest in part.items()})
    return steps


def test_one_then_two_then_one_process(longer: Config, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two processes make it longer than the one that began it."""
    run = tmp_path / "run"
    (tmp_path / "config.json").write_text(longer.to_json())

    def logs() -> set[Path]:
        return set(tmp_path.glob("run.*.jsonl"))

    until.train_until(dataclasses.replace(longer, train=dataclasses.replace(longer.train, steps=5)), run, 5)
    alone = logs()
    seen = rows_seen(sorted(alone))
    for path in alone:
        path.unlink()
    environment.setenv("E2P", f"{sys.executable} {HERE / 'until.py'}")
    command = [LAUNCH / "local.sh", "2", "--", tmp_path / "config.json", run, "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on" in done.stderr and "resumed at step 5" in done.stderr, done.stderr
    together = logs()
    assert len(together) == 2 and json.loads((run / "config.json").read_text())["train"]["steps"] == STEPS
    seen += rows_seen(sorted(together))
    for path in together:
        path.unlink()
    until.train_until(longer, run, STEPS)
    seen += rows_seen(sorted(logs()))
    assert len(seen) == STEPS

    data = read_data(read_inputs(longer)).train
    count = len(data.rows)
    assert count < STEPS * ROWS < 2 * count
    order = np.concatenate([np.random.default_rng([longer.train.seed, e]).permutation(count) for e in range(2)])
    expected = []
    for step in range(STEPS):
        batch = data.batch(order[step * ROWS : (step + 1) * ROWS].tolist())
        pairs = zip(batch["tokens"], batch["user_embeddings"], strict=True)
        expected.append([hashlib.sha256(t.tobytes() + v.tobytes()).hexdigest() for t, v in pairs])
    assert [[step[str(row)] for row in range(ROWS)] for step in seen] == expected
    epoch = [digest for step in seen for digest in (step[str(row)] for row in range(ROWS))][:count]
    assert len(set(epoch)) == count
