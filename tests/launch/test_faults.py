"""Signals, deaths and rivals: the run saves itself, is started again, and ends as an unbroken one does."""

import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.config import Config
from e2p_jax.errors import RESTART, Preempted, UserError
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
    settings = dataclasses.replace(config.train, steps=60, eval_every=30, checkpoint_every=10)
    return dataclasses.replace(config, train=settings)


@pytest.fixture(scope="module")
def unbroken(longer: Config, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return numbers(train(longer, tmp_path_factory.mktemp("unbroken") / "run"))


@pytest.mark.parametrize("moment", ["", "checkpoints/10", "checkpoints/30"])
def test_sigterm_saves_and_the_rerun_is_bit_for_bit(
    longer: Config, unbroken: list[dict[str, float]], tmp_path: Path, moment: str
) -> None:
    """While the first step compiles, and when a checkpoint and an evaluation have just been written."""
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)

    def tell() -> None:
        wait_for(lambda: signal.getsignal(signal.SIGTERM) is not before and (run / moment).exists())
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(Preempted, match="saved at step"):
        train(longer, run)
    teller.join()
    assert 0 < last_step(run) < 60
    train(longer, run)
    assert numbers(run) == unbroken


def test_two_processes_are_started_again_and_end_alike(
    environment: pytest.MonkeyPatch, longer: Config, unbroken: list[dict[str, float]], tmp_path: Path
) -> None:
    """One is told to stop, then one is killed; both times both end, and the launcher starts them again."""
    run = tmp_path / "run"
    stored = tmp_path / "config.json"
    stored.write_text(longer.to_json())
    (tmp_path / "small.py").write_text(
        f"from pathlib import Path\nfrom e2p_jax.config import from_json\nstored = Path({str(stored)!r})\n"
        "config = from_json(stored.read_text(), stored)\n"
    )
    command = [LAUNCH / "local.sh", "2", "--restarts", "2", "--", "train", tmp_path / "small.py", "--workdir", run]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as launcher:

        def second() -> int:
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            return int(children[-1])

        wait_for(lambda: (run / "checkpoints" / "10").exists() or launcher.poll())
        os.kill(second(), signal.SIGTERM)
        wait_for(lambda: "restart 1 of 2" in log.read_text() or launcher.poll())
        stopped_at = last_step(run)
        wait_for(lambda: f"train {stopped_at + 2}/60" in log.read_text() or launcher.poll())
        killed = time.monotonic()
        os.kill(second(), signal.SIGKILL)
        wait_for(lambda: "restart 2 of 2" in log.read_text() or launcher.poll())
        bound = time.monotonic() - killed
        launcher.wait(timeout=400)
    said = log.read_text()
    assert launcher.returncode == 0, said
    assert said.count(f"told to stop; saved at step {stopped_at}") == 2 and f"exit code {RESTART}" in said
    assert "e2p: lost process 1 (host " in said and bound < 15
    for ours, theirs in zip(numbers(run), unbroken, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


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


def test_an_error_outweighs_a_lost_process(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "program").write_text("exit $((JAX_PROCESS_ID ? 1 : 75))\n")
    environment.setenv("E2P", "bash")
    command = [LAUNCH / "local.sh", "2", "--restarts", "3", "--", tmp_path / "program"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1


def test_a_process_that_never_meets_the_others_is_ended(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "program").write_text("((JAX_PROCESS_ID)) && exit 3; sleep 100 & wait\n")
    environment.setenv("E2P", "bash")
    started = time.monotonic()
    done = subprocess.run([LAUNCH / "local.sh", "2", "--", tmp_path / "program"], check=False)
    assert done.returncode == 3 and time.monotonic() - started < 20


def test_signals_reach_the_program_and_end_the_restarts(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "program").write_text(
        f"trap 'echo told >> {tmp_path}/log; exit 75' TERM; echo started >> {tmp_path}/log; sleep 100 & wait\n"
    )
    environment.setenv("E2P", "bash")
    with subprocess.Popen([LAUNCH / "run.sh", "--restarts", "3", "--", tmp_path / "program"]) as launcher:
        wait_for((tmp_path / "log").exists)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=20) == 75
    assert (tmp_path / "log").read_text() == "started\ntold\n"
