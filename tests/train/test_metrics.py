"""The numbers of a run: appended, durable, and cut back to the checkpoint on resume."""

import json
import os
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from e2p_jax.errors import UserError
from e2p_jax.train import metrics
from e2p_jax.train.metrics import MetricsLog, Progress, Recorder, read_metrics


def events(run: Path) -> list[Any]:
    """Reads TensorBoard's records: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += length + 16
    return found


def scalars(run: Path) -> list[tuple[int, str, float]]:
    return [(e.step, value.tag, value.simple_value) for e in events(run) for value in e.summary.value]


def test_lines_and_tensorboard_hold_what_was_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"train/loss": 2.5, "train/grad_norm": 0.5})
    log.write(2, {"eval/validation/nll": 1.25})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "train/loss": 2.5, "train/grad_norm": 0.5},
        {"step": 2, "eval/validation/nll": 1.25},
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    assert scalars(tmp_path) == [(1, "train/loss", 2.5), (1, "train/grad_norm", 0.5), (2, "eval/validation/nll", 1.25)]


@pytest.mark.parametrize("torn", ["", "{", '{"step": 4, "tra', '{"step": 4, "train/loss": 1.0', '{"step": 4}'])
def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path, torn: str) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": 1.0 / step})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    for event_file in (tmp_path / "tensorboard").iterdir():  # its name is its second
        event_file.rename(event_file.with_name("events.out.tfevents.0.earlier"))

    log = MetricsLog(tmp_path, 2)
    assert path.read_text() == '{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": 0.5}\n'
    log.write(3, {"train/loss": 9.0})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[-1]["train/loss"] == 9.0
    # TensorBoard forgets what it saw from the step of a START on.
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log") and e.session_log.status == 1]
    assert starts[-1] == 3 and scalars(tmp_path)[-1] == (3, "train/loss", 9.0)


def test_what_was_synced_survives_a_kill(tmp_path: Path) -> None:
    program = """
        import os, pathlib, signal, sys
        from e2p_jax.train.metrics import MetricsLog
        log = MetricsLog(pathlib.Path(sys.argv[1]), 0)
        log.write(1, {"train/loss": 2.0})
        log.sync()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], env=environment, check=False)
    assert done.returncode == -9
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.0}]
    assert scalars(tmp_path) == [(1, "train/loss", 2.0)]


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(steps=100, done=10, label="train")
    progress.say("[bold]as it is[/bold]")
    progress.update(20, "loss 1.5", show=True)
    progress.update(30, "hidden", show=False)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first == "[bold]as it is[/bold]"
    assert re.fullmatch(r"train 20/100  loss 1\.5  ETA \d+:\d\d", second)


class Loss(NamedTuple):
    loss: jax.Array


def recorder_of(run: Path) -> Recorder:
    return Recorder(run, steps=7, first=2, log_every=2, tokens_per_step=1000, users=lambda step: f"'user-{step}'")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("number", [5, 6])
def test_a_step_that_is_not_finite_ends_the_run_whether_it_is_logged_or_not(
    tmp_path: Path, number: int, wrong: float
) -> None:
    recorder = recorder_of(tmp_path)
    recorder.step(4, Loss(jnp.float32(1.0)))
    recorder.step(number, Loss(jnp.float32(wrong)))
    said = (
        rf"step {number} is not finite \(loss {wrong}\), and nothing of it was saved; users .*: 'user-{number}'; look"
    )
    with pytest.raises(UserError, match=said):
        recorder.step(number + 1, Loss(jnp.float32(1.0)))
    recorder.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4]
    for ends in (Recorder.flush, Recorder.sync, lambda r: r.evaluation(number, {"dev": 1.0})):
        recorder = recorder_of(tmp_path)
        recorder.step(number, Loss(jnp.float32(wrong)))
        with pytest.raises(UserError, match=said):
            ends(recorder)
        recorder.close()


def test_recorder_writes_a_step_late_and_everything_before_a_checkpoint(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path)

    def step(number: int) -> list[int]:
        recorder.step(number, Loss(jnp.float32(number / 4)))
        return [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]

    assert [step(number) for number in (3, 4, 5, 6)] == [[], [3], [3, 4], [3, 4]]
    recorder.evaluation(6, {"validation": 1.5, "test": 2.5})
    assert step(7) == [3, 4, 6, 6]
    recorder.sync()
    recorder.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line.get("train/loss")) for line in lines] == [
        (3, 0.75),
        (4, 1.0),
        (6, 1.5),
        (6, None),
        (7, 1.75),
    ]
    assert lines[3] == {"step": 6, "eval/validation/nll": 1.5, "eval/test/nll": 2.5}
    assert all(line["train/tokens_per_second"] > 0 for line in lines if "train/loss" in line)


def test_speed_is_that_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens since the last line over the seconds since; those of an evaluation do not count."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    recorder = recorder_of(tmp_path)
    for number, clock.now in ((3, 100.0), (4, 102.0), (5, 106.0), (6, 107.0)):  # each settles the one before
        recorder.step(number, Loss(jnp.float32(1.0)))
    clock.now = 110.0
    recorder.flush()
    clock.now = 200.0
    recorder.evaluation(6, {"dev": 1.0})
    recorder.step(7, Loss(jnp.float32(1.0)))
    clock.now = 205.0
    recorder.sync()
    recorder.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    speeds = {line["step"]: line["train/tokens_per_second"] for line in lines if "train/loss" in line}
    assert speeds == {3: 1000 / 2, 4: 1000 / 4, 6: 2000 / 4, 7: 1000 / 5}
