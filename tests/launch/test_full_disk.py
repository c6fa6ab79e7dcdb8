"""A disk that fills up during a save."""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import fill

from e2p_jax.config import Config
from e2p_jax.errors import UserError
from e2p_jax.files import explain_full_disk, replace_directory
from e2p_jax.tensors import write_tensors
from e2p_jax.train import loop
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.loop import train
from e2p_jax.train.metrics import read_metrics


# Of a save that failed, tensorstore's threads still report to an event loop that Orbax has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_last_good_checkpoint_stays_readable(config: Config, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, settings = disk / "run", dataclasses.replace(config.train, steps=6, eval_every=6)
    config = dataclasses.replace(config, train=settings)

    class Filling(Checkpoints):
        def save(self, state, *rest) -> None:  # type: ignore[no-untyped-def]
            super().save(state, *rest)
            if int(state.step) == 2:
                self.wait()
                fill(disk, left=32_768)  # enough for the lines of a few steps

    monkeypatch.setattr(loop, "Checkpoints", Filling)
    with pytest.raises(UserError, match=rf"{run}: no space left on the device; what was saved before is whole\. Make"):
        train(config, run)
    monkeypatch.undo()
    checkpoints = Checkpoints(run)
    assert checkpoints.step_of("last") == 2
    checkpoints.check(2)
    checkpoints.close()
    (disk / "filler").unlink()
    train(config, run)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert Checkpoints(run).step_of("last") == 6


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (ValueError("shape"), OSError(errno.EIO, "Input/output error"), UserError("No space left on device")):
        with pytest.raises(type(error), match=str(error).replace("[", r"\[")) as caught, explain_full_disk(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(UserError, match="no space left"), explain_full_disk(tmp_path):
        raise RuntimeError("a background write failed") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_output_that_does_not_fit_leaves_the_one_before(disk: Path) -> None:
    with replace_directory(disk / "out") as new:
        (new / "model.safetensors").write_bytes(b"before")
    refused = pytest.raises(UserError, match=r"out: no space left on the device; what was saved before is whole")
    with refused, replace_directory(disk / "out") as new:
        write_tensors(new, [("large", np.zeros(5_000_000, np.uint8))])
    assert [path.name for path in disk.rglob("*") if path.is_file()] == ["model.safetensors"]
    assert (disk / "out" / "model.safetensors").read_bytes() == b"before"
