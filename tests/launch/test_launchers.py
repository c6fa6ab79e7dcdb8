"""Real launchers start two processes of two devices; their loss curves and replies are those of one process of four.

How processes are started and how a mesh spans them do not meet: one launcher takes the meshes whose runs reply, the
others the one that is left.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import meshes
import numpy as np
import pytest

from e2p_jax.config import Config
from e2p_jax.train.metrics import read_metrics

TIMEOUT = 600
HERE = Path(__file__).parent
LAUNCH = HERE.parent.parent / "launch"
WITHOUT = "not installed here; tests/launch/install.sh installs it"


@pytest.fixture(scope="module")
def reference(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in this process."""
    out = tmp_path_factory.mktemp("reference")
    meshes.train_each(config, out)
    return out


@pytest.fixture
def program(environment: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    environment.setenv("E2P", f"{sys.executable} {HERE / 'meshes.py'}")
    return environment


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [
        (int(line["step"]), name, value)
        for line in read_metrics(run / "metrics.jsonl")
        for name, value in line.items()
        if name.endswith(("loss", "nll"))
    ]


def check(command: list[str | Path], config: Config, reference: Path, tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "config.json").write_text(config.to_json())
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "--", tmp_path / "config.json", out, *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 process(es) on") == len(names), done.stderr  # said by process 0 alone
    for name in names:
        ours, theirs = losses(out / name), losses(reference / name)
        assert [line[:2] for line in ours] == [line[:2] for line in theirs] and len(ours) == 4
        np.testing.assert_allclose([line[2] for line in ours], [line[2] for line in theirs], rtol=1e-6)
        if "tensor" in name:
            replies = json.loads((out / name / "replies.json").read_text())
            assert len({token for reply in replies for token in reply}) > 6
            assert replies == json.loads((reference / name / "replies.json").read_text())


def test_local(program: pytest.MonkeyPatch, config: Config, reference: Path, tmp_path: Path) -> None:
    check([LAUNCH / "local.sh", "2"], config, reference, tmp_path, ["data-tensor", "fsdp-tensor"])


def test_local_begins_with_a_run(program: pytest.MonkeyPatch, config: Config, reference: Path, tmp_path: Path) -> None:
    """Every process reads the other run's projector, and the first loss is a trained one's."""
    started = config.change(
        projector={"start": str(reference / "data-tensor")}, train={"trainable": ("projector/bias",)}
    )
    meshes.train_each(started, tmp_path / "alone", ["fsdp"])
    check([LAUNCH / "local.sh", "2"], started, tmp_path / "alone", tmp_path, ["fsdp"])
    fresh, started_at = (losses(place / "fsdp")[0][2] for place in (reference, tmp_path / "out"))
    assert fresh - started_at > 1e-4, "a training began anew"


@pytest.mark.skipif(shutil.which("mpirun") is None, reason=f"Open MPI is {WITHOUT}")
def test_mpirun(program: pytest.MonkeyPatch, config: Config, reference: Path, tmp_path: Path) -> None:
    for variable in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        program.setenv(variable, "1")
    command = ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", LAUNCH / "run.sh"]
    check(command, config, reference, tmp_path, ["fsdp"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration of a Slurm of one node; one at a time on this machine, whichever test process asks."""
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "srun")):
        pytest.skip(f"Slurm is {WITHOUT}")
    place = tmp_path_factory.mktemp("slurm")
    with (Path(tempfile.gettempdir()) / "e2p_jax_slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(
            [HERE / "slurm_cluster.sh", place],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield place / "slurm.conf"
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            if process.returncode is None:  # a job step that outlived its test keeps slurmd waiting for ever
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def slurm(cluster: Path, program: pytest.MonkeyPatch) -> None:
    """An environment in which Slurm's programs find it."""
    program.setenv("SLURM_CONF", str(cluster))


def test_srun(slurm: None, config: Config, reference: Path, tmp_path: Path) -> None:
    check(["srun", "-n", "2", LAUNCH / "run.sh"], config, reference, tmp_path, ["fsdp"])


def test_sbatch_starts_a_process_a_task_and_gives_errors_on(
    slurm: None, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An error of the command is the job's, and is not requeued; it is said with the host's name."""
    environment.setenv("E2P", f"{sys.executable} -m e2p_jax")
    log = tmp_path / "log"
    job = submit(log, "--", "train", "quickstart", "--workdir", tmp_path / "run", "--data.path", "nowhere.jsonl")
    assert "ExitCode=1:0" in end_of(job), log.read_text()
    assert f"(host {os.uname().nodename}): " in log.read_text() and "nowhere.jsonl" in log.read_text()
    assert "restart" not in log.read_text()


def test_sbatch_requeues_a_preempted_job(slurm: None, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By scontrol, as often as it was told to; Slurm would let the job wait for two minutes, this test does not."""
    environment.setenv("E2P", "bash")
    expected, jobs = {"1": ["75", "0"], "0": ["75"]}, {}
    for restarts in expected:  # at once
        folder = tmp_path / restarts
        folder.mkdir()
        (folder / "program").write_text(
            f"code=$((SLURM_RESTART_COUNT ? 0 : 75)); echo $code >> {folder}/ends.$SLURM_PROCID; exit $code\n"
        )
        jobs[restarts] = submit(folder / "log", "--restarts", restarts, "--", folder / "program")
    for restarts, job in jobs.items():
        assert ("JobState=COMPLETED" in end_of(job)) == (restarts == "1")
        for process in range(2):
            assert (tmp_path / restarts / f"ends.{process}").read_text().split() == expected[restarts]
        log = (tmp_path / restarts / "log").read_text()
        assert ("exit code 75; restart 1 of 1" in log) == (restarts == "1")


def submit(log: Path, *arguments: str | Path) -> str:
    """A job of two tasks."""
    command = ["sbatch", "--parsable", "--ntasks", "2", "--output", log, LAUNCH / "slurm.sbatch", *arguments]
    return subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True, check=True).stdout.strip()


def end_of(job: str) -> str:
    """What Slurm says of it when it has ended; it is asked more often than `sbatch --wait` asks."""
    deadline = time.monotonic() + TIMEOUT
    while "JobState=COMPLETED" not in (state := _show(job)) and "JobState=FAILED" not in state:
        assert time.monotonic() < deadline, state
        if "Reason=BeginTime" in state:
            update = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            subprocess.run(update, check=False, capture_output=True)
        time.sleep(0.5)
    return state


def _show(job: str) -> str:
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
