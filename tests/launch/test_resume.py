"""What a run may be resumed with, and that it ends as if it had never been left."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import until
from test_host_counts import HERE

from e2p_jax.config import Config, MeshConfig, from_json
from e2p_jax.errors import Preempted, UserError
from e2p_jax.train.loop import train
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.optimizer import schedule

STEPS = 6


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


@pytest.fixture(scope="module")
def short(config: Config) -> Config:
    """Six steps on a mesh of four, dropout and all."""
    return changed(
        config, train={"steps": STEPS, "warmup_steps": 2, "eval_every": 3, "checkpoint_every": 2}, mesh={"data": 4}
    )


@pytest.fixture(scope="module")
def unbroken(short: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(short, tmp_path_factory.mktemp("unbroken") / "run")


def stop_at(config: Config, run: Path, step: int) -> None:
    with contextlib.suppress(Preempted):
        until.train_until(config, run, step)


def end_of(run: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The last checkpoint's parameters, optimizer state and key, by path, and its position."""
    place = run / "checkpoints" / str(STEPS)
    with ocp.StandardCheckpointer() as checkpointer:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        there = dict(checkpointer.metadata(place / "state").item_metadata)
        wanted = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for path, leaf in there.items()}
        state = checkpointer.restore(place / "state", wanted)
    return jax.tree.map(np.asarray, state), json.loads((place / "data" / "metadata").read_text())


def logged(run: Path, name: str) -> dict[int, float]:
    return {int(line["step"]): line[name] for line in read_metrics(run / "metrics.jsonl") if name in line}


def test_any_mesh(short: Config, unbroken: Path, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Begun on data=4, resumed on fsdp=2 x tensor=2 and then on one device, in a process that has no more.

    That process compiles as a user's does: with all optimisations.
    """
    run, config = tmp_path / "run", tmp_path / "config.json"
    stop_at(short, run, 2)
    stop_at(dataclasses.replace(short, mesh=MeshConfig(data=1, fsdp=2, tensor=2)), run, 4)
    config.write_text(dataclasses.replace(short, mesh=MeshConfig(data=1)).to_json())
    environment.delenv("XLA_FLAGS")
    command = [sys.executable, HERE / "until.py", config, run, str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "mesh data=1 fsdp=1 tensor=1" in done.stderr and "resumed at step 4" in done.stderr
    (state, position), (wanted, at) = end_of(run), end_of(unbroken)
    assert position == at and state.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(state[path], value, rtol=1e-5, atol=1e-5, err_msg=path)
    for name in ("train/loss", "eval/dev/nll"):
        ours, theirs = logged(run, name), logged(unbroken, name)
        assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) > 1


def test_what_has_no_say_changes_no_bit(short: Config, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop_at(short, run, 2)
    free = {"log_every": 4, "keep_last": 5, "keep_best": 2, "checkpoint_every": 1}
    other = changed(short, train=free, data={"cache": "none", "max_bad_share": 0.5})
    train(other, run)
    (state, position), (wanted, at) = end_of(run), end_of(unbroken)
    assert position == at and from_json((run / "config.json").read_bytes(), run / "config.json") == other
    for path, value in wanted.items():
        np.testing.assert_array_equal(state[path], value, err_msg=path)
    assert logged(run, "eval/dev/nll") == logged(unbroken, "eval/dev/nll")


def test_steps_grow_when_all_are_done(short: Config, unbroken: Path, tmp_path: Path) -> None:
    """Not before; the steps that are done keep their rates, those to come have the rates of the new length."""
    run, shorter = tmp_path / "run", changed(short, train={"steps": 4, "checkpoint_every": 1, "keep_last": 9})
    stop_at(shorter, run, 3)
    begun = (run / "config.json").read_bytes()
    with pytest.raises(
        UserError, match=r"train\.steps: 4 there, 6 here \(it may grow, and only when all steps are done"
    ):
        train(short, run)
    assert (run / "config.json").read_bytes() == begun
    train(shorter, run)
    longer = changed(shorter, train={"steps": STEPS})
    train(longer, run)
    with pytest.raises(UserError, match=r"train\.steps: 6 there, 4 here"):
        train(shorter, run)
    rate = jax.jit(schedule(shorter.train))
    rates = {step: float(rate(step - 1)) for step in range(1, 5)}
    rates |= {step: logged(unbroken, "train/learning_rate")[step] for step in (5, 6)}
    assert logged(run, "train/learning_rate") == pytest.approx(rates, rel=1e-6)
    assert rates[4] < logged(unbroken, "train/learning_rate")[4] and rates[4] < float(rate(2))
    (state, position), (wanted, at) = end_of(run), end_of(unbroken)
    assert position == at and state.keys() == wanted.keys()
    counts = [path for path in wanted if path == "step" or path.endswith("count")]
    assert len(counts) > 1 and all(state[path] == STEPS for path in counts)

    for step in (4, 5, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
    with pytest.raises(
        UserError, match=r"checkpoint 3 is on the way to train\.steps=4, not 6: set that in config\.json"
    ):
        train(longer, run)
    edited = json.loads((run / "config.json").read_text())
    edited["train"]["steps"] = 4
    (run / "config.json").write_text(json.dumps(edited))
    train(shorter, run)  # as it says
    assert (run / "checkpoints" / "4").is_dir()
