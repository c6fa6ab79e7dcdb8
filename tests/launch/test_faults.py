"""Signals, deaths and rivals: the run saves itself, is started again, and ends as an unbroken one does."""

import dataclasses
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from e2p_jax.config import Config
from e2p_jax.errors import RESTART, Preempted, UserError
from e2p_jax.train import loop
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.loop import train
from e2p_jax.train.metrics import read_metrics

LAUNCH = Path(__file__).parent.parent.parent / "launch"


def numbers(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in read_metrics(run / "metrics.jsonl")]


def last_step(run: Path) -> int:
    checkpoints = Checkpoints(run)
    step = checkpoints.step_of("last")
    checkpoints.close()
    return step


def wait_for(happened: Callable[[], object], timeout: float = 400) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def longer(config: Config) -> Config:
    settings = dataclasses.replace(config.train, steps=30, eval_every=15, checkpoint_every=10)
    return dataclasses.replace(config, train=settings)


@pytest.fixture(scope="module")
def unbroken(longer: Config, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return numbers(train(longer, tmp_path_factory.mktemp("unbroken") / "run"))


@pytest.mark.parametrize("moment", ["compilation", "step", "evaluation", "checkpoint"])
def test_sigterm_saves_and_the_rerun_is_bit_for_bit(
    longer: Config,
    unbroken: list[dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: Literal["compilation", "step", "evaluation", "checkpoint"],
) -> None:
    """In the middle of each."""
    run = tmp_path / "run"

    def tell() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    if moment == "compilation":
        before = signal.getsignal(signal.SIGTERM)

        def wait_and_tell() -> None:  # its handler is there just before the first step is traced
            wait_for(lambda: signal.getsignal(signal.SIGTERM) is not before)
            tell()

        teller = threading.Thread(target=wait_and_tell)
        teller.start()
    elif moment == "step":
        step = loop.Recorder.step

        def tell_and_step(self: loop.Recorder, number: int, metrics: Any) -> None:
            if number == 7:  # it is dispatched, and its result not awaited
                tell()
            step(self, number, metrics)

        monkeypatch.setattr(loop.Recorder, "step", tell_and_step)
    elif moment == "evaluation":
        score = loop.score
        monkeypatch.setattr(loop, "score", lambda *arguments: (tell(), score(*arguments))[1])
    else:
        save = Checkpoints.save

        def save_and_tell(*arguments: Any) -> None:  # it goes on in the background
            save(*arguments)
            tell()

        monkeypatch.setattr(Checkpoints, "save", save_and_tell)
    with pytest.raises(Preempted, match="saved at step") as caught:
        train(longer, run)
    expected = {"step": 7, "evaluation": 15, "checkpoint": 11}.get(moment)
    assert expected is None or f"saved at step {expected}," in str(caught.value)
    monkeypatch.undo()
    assert 0 < last_step(run) < 30
    train(longer, run)
    assert numbers(run) == unbroken


KILLS = int(os.environ.get("E2P_TEST_KILLS", "1"))


def two_processes(config: Config, folder: Path, restarts: int) -> list[str | Path]:
    """The command that trains in `folder/run`."""
    folder.mkdir()
    stored = folder / "config.json"
    stored.write_text(config.to_json())
    arguments = ["--restarts", str(restarts), "--", "train", stored, "--workdir", folder / "run"]
    return [LAUNCH / "local.sh", "2", *arguments]


def test_two_processes_are_started_again_and_end_alike(
    environment: pytest.MonkeyPatch, longer: Config, unbroken: list[dict[str, float]], tmp_path: Path
) -> None:
    """One is told to stop; then one of them is killed, with E2P_TEST_KILLS=20 twenty times at random moments. Both end
    every time, within a bound, the launcher starts them again, and the metrics are those of a run left alone.
    """
    steps, random = longer.train.steps, np.random.default_rng(0)
    if KILLS > 1:
        steps = 300 * KILLS
        more = {"steps": steps, "eval_every": steps // 2, "checkpoint_every": 50, "log_every": 10}
        settings = dataclasses.replace(longer.train, **more)
        longer = dataclasses.replace(longer, train=settings)
        subprocess.run(two_processes(longer, tmp_path / "unbroken", 0), check=True, capture_output=True)
        unbroken = numbers(tmp_path / "unbroken" / "run")
    command = two_processes(longer, tmp_path / "broken", KILLS + 1)
    run, log, bounds = tmp_path / "broken" / "run", tmp_path / "log", []
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as launcher:

        def worker(number: int) -> int:
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            return int(children[number])

        def wait_for_log(text: str) -> None:
            wait_for(lambda: text in log.read_text() or launcher.poll() is not None)

        wait_for(lambda: any(run.glob("checkpoints/*0")) or launcher.poll())
        os.kill(worker(-1), signal.SIGTERM)
        wait_for_log(f"restart 1 of {KILLS + 1}")
        stopped_at, began = last_step(run), time.monotonic()
        wait_for_log(f"train {stopped_at + 1}/{steps}")
        start = time.monotonic() - began
        for number in range(2, KILLS + 2):
            if number > 2:  # from the first import to some way into the steps
                time.sleep(random.uniform(0.5, 1.5 * start))
            assert launcher.poll() is None, f"ended before kill {number - 1}: {log.read_text()}"
            killed = time.monotonic()
            os.kill(worker(int(random.integers(-2, 0))), signal.SIGKILL)
            wait_for_log(f"restart {number} of {KILLS + 1}")
            bounds.append(time.monotonic() - killed)
        launcher.wait(timeout=1000)
    said = log.read_text()
    print(
        f"after each kill the next start came within {max(bounds):.1f} s; resumed", re.findall(r"resumed at .*", said)
    )
    assert launcher.returncode == 0, said
    assert said.count(f"told to stop; saved at step {stopped_at}") == 2 and f"exit code {RESTART}" in said
    assert re.search(r"e2p: lost process [01] \(host ", said) and max(bounds) < 30
    logged = {line["step"] for line in unbroken}  # a resumed run logs its first step too
    for ours, theirs in zip([line for line in numbers(run) if line["step"] in logged], unbroken, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5, atol=1e-5)


def test_a_second_run_in_one_directory_is_refused(config: Config, tmp_path: Path) -> None:
    from e2p_jax.train.run import lock_run

    with (
        lock_run(tmp_path),
        pytest.raises(UserError, match=rf"process {os.getpid()} on host .* is training there; .* another --workdir"),
    ):
        train(config, tmp_path)
    with lock_run(tmp_path):
        pass


@pytest.mark.parametrize(
    ("program", "restarts", "code", "starts"),
    [
        ("exit 0", 3, 0, 1),
        ("exit 1", 3, 1, 1),
        ("exit 2", 3, 2, 1),
        ("exit 75", 2, 75, 3),
        ("exit 75", 0, 75, 1),
        ("kill -KILL $$", 1, 137, 2),
    ],
)
def test_only_what_a_rerun_can_help_is_run_again(
    environment: pytest.MonkeyPatch, tmp_path: Path, program: str, restarts: int, code: int, starts: int
) -> None:
    (tmp_path / "program").write_text(f"echo started >> {tmp_path}/log\n{program}\n")
    environment.setenv("E2P", "bash")
    command = [LAUNCH / "run.sh", "--restarts", str(restarts), "--", tmp_path / "program"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == code
    assert (tmp_path / "log").read_text().count("started") == starts


def test_an_error_outweighs_a_lost_process_and_one_that_meets_nobody_is_ended(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whichever of error and loss is seen first; all launchers wait for the others' end at once."""
    environment.setenv("E2P", "bash")
    programs = {
        "loss": ("((JAX_PROCESS_ID == 0)) || sleep 1; exit $((JAX_PROCESS_ID ? 1 : 75))", 1),
        "error": ("((JAX_PROCESS_ID == 1)) || sleep 1; exit $((JAX_PROCESS_ID ? 1 : 75))", 1),
        "alone": ("((JAX_PROCESS_ID)) && exit 3; sleep 100 & wait", 3),
    }
    started, launchers = time.monotonic(), {}
    for name, (program, _) in programs.items():
        (tmp_path / name).write_text(f"{program}\n")
        launchers[name] = subprocess.Popen([LAUNCH / "local.sh", "2", "--restarts", "3", "--", tmp_path / name])
    assert {name: launcher.wait() for name, launcher in launchers.items()} == {
        n: code for n, (_, code) in programs.items()
    }
    assert time.monotonic() - started < 20


def test_signals_reach_the_program_and_end_the_restarts(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "program").write_text(
        f"trap 'echo told >> {tmp_path}/log; exit 75' TERM; echo started >> {tmp_path}/log; sleep 100 & wait\n"
    )
    environment.setenv("E2P", "bash")
    with subprocess.Popen([LAUNCH / "run.sh", "--restarts", "3", "--", tmp_path / "program"]) as launcher:
        wait_for((tmp_path / "log").exists)
        launcher.send_signal(signal.SIGTERM)
        try:
            assert launcher.wait(timeout=20) == 75
        finally:
            launcher.kill()
    assert (tmp_path / "log").read_text() == "started\ntold\n"
