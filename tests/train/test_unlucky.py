"""Steps that are not finite, and stops: nothing that was kept is lost, and nobody waits for long."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, TrainConfig
from e2p_jax.data.pipeline import train_iterator
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.errors import Preempted, UserError
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.parallel.mesh import make_mesh
from e2p_jax.prefix import mlp
from e2p_jax.train import loop, score
from e2p_jax.train.loop import read_data, train
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.run import open_run
from e2p_jax.train.setup import read_inputs
from e2p_jax.vectors.table import save_table

USERS = range(16)


@pytest.fixture(scope="module")
def config(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Six steps, a checkpoint each, evaluated after the fourth and the last."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl([synthetic.record(user) for user in USERS], folder / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="synthetic", version="1")
    return Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(path=str(folder / "records.jsonl"), embeddings=str(folder / "table"), seq_len=128),
        projector=mlp.Settings(hidden_size=16),
        train=TrainConfig(steps=6, rows=4, warmup_steps=2, eval_every=4, checkpoint_every=1, log_every=3),
        evaluate=EvaluateConfig(conditions=()),
    )


@pytest.fixture(scope="module")
def unbroken(config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    return numbers(train(config, tmp_path_factory.mktemp("unbroken") / "run"))


def numbers(run: Path) -> dict[tuple[int, bool], dict[str, float]]:
    """metrics.jsonl by step, without what depends on the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    return {
        (line["step"], "train/loss" in line): {k: v for k, v in line.items() if "per_second" not in k} for line in lines
    }


def saved(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


class Changed:
    """A train step between what takes and gives a state: the step's own program, whose rounding is that of any run."""

    def __init__(self, step: Any, before: Callable[[Any], Any], after: Callable[[Any], Any]):
        self.step, self.before, self.after = step, jax.jit(before), jax.jit(after)

    def lower(self, *arguments: Any) -> "Changed":
        return Changed(self.step.lower(*arguments), self.before, self.after)

    def compile(self) -> "Changed":
        return Changed(self.step.compile(), self.before, self.after)

    def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
        state, metrics = self.step(self.before(state), frozen, batch)
        return self.after(state), metrics


def changed_step(monkeypatch: pytest.MonkeyPatch, before: Callable[[Any], Any], after: Callable[[Any], Any]) -> None:
    """Puts what takes and gives a state around every train step."""
    make = loop.jit_train_step
    monkeypatch.setattr(loop, "jit_train_step", lambda *arguments, **_: Changed(make(*arguments), before, after))


def test_a_step_that_is_not_finite_stops_before_anything_is_saved_and_the_rerun_goes_on(
    config: Config, unbroken: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a device fails once: the rerun ends like a run left alone."""

    def fail(state: Any) -> Any:
        at = state.step == 4  # steps done
        return state._replace(trainable=jax.tree.map(lambda p: jnp.where(at, jnp.nan, p), state.trainable))

    changed_step(monkeypatch, fail, lambda state: state)
    with pytest.raises(
        UserError, match=r"^step 5 is not finite \(loss nan, grad_norm nan, parameter_norm nan\)"
    ) as caught:
        train(config, tmp_path / "run")
    settings, data = config.train, read_data(read_inputs(config)).train
    batches = train_iterator(data, make_mesh(config.mesh), batch_rows=settings.rows, steps=6, seed=settings.seed)
    batch = list(batches)[4]
    sizes = np.abs(batch["user_embeddings"]).max(axis=-1).ravel()
    largest = batch["user_embeddings"].reshape(len(sizes), -1)[sizes.argmax()]
    (first,) = [user for user in USERS if (synthetic.vector(user).astype(np.float32) == largest).all()]
    assert f"users of its batch, largest vectors first: 'user-{first}'" in str(caught.value)
    assert saved(tmp_path / "run")[-1] == 4
    monkeypatch.undo()
    train(config, tmp_path / "run")
    resumed = numbers(tmp_path / "run")
    assert {step: resumed[step] for step in unbroken} == unbroken


def test_a_learning_rate_that_ruins_the_parameters_is_found_in_the_step_that_it_ruins(
    config: Config, tmp_path: Path
) -> None:
    """The loss and the gradient of that step are those of before, and finite."""
    settings = dataclasses.replace(config.train, learning_rate=3e38)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^step 2 is not finite \(parameter_norm inf\).*lower train.learning_rate"):
            train(dataclasses.replace(config, train=settings), tmp_path / "run")
        assert saved(tmp_path / "run") == [1]


def test_an_nll_that_is_not_finite_is_an_error_of_its_split_and_ranks_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loop, score):
        make = module.jit_eval_step

        def poisoned(*arguments: Any, make: Any = make, **_: Any) -> Any:
            step = make(*arguments)
            return lambda trainable, frozen, batch: step(trainable, frozen, batch).at[0, 0].set(jnp.nan)

        monkeypatch.setattr(module, "jit_eval_step", poisoned)
    with pytest.raises(UserError, match=r"after step 4, split dev: the NLL of . of 2 conversations .* those of 'user-"):
        train(config, tmp_path / "run")
    assert saved(tmp_path / "run")[-1] == 3
    opened = open_run(tmp_path / "run", "last")
    with pytest.raises(UserError, match=r"the NLL of . of 2 conversations is not finite, those of 'user-"):
        evaluate(opened, [synthetic.record(user) for user in (0, 1)], "test", ["e2p"])


def test_a_stop_takes_the_running_step_the_next_and_a_save(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing is logged, saved or evaluated for long."""
    begun: list[int] = []

    def wait(step: jax.Array) -> np.ndarray:
        begun.append(int(step))  # and no operation on it: that would wait for the device, which waits for this
        if begun[-1] == 3:  # in step 4; step 5 may be on its way
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return np.int32(begun[-1])

    def slow(state: Any) -> Any:
        return state._replace(step=jax.pure_callback(wait, jax.ShapeDtypeStruct((), np.int32), state.step))

    changed_step(monkeypatch, slow, lambda state: state)
    more = {"steps": 60, "eval_every": 60, "checkpoint_every": 60, "log_every": 60}
    settings = dataclasses.replace(config.train, **more)
    with pytest.raises(Preempted, match=r"saved at step [45],"):
        train(dataclasses.replace(config, train=settings), tmp_path / "run")
    assert begun == [*range(len(begun))] and saved(tmp_path / "run") == [len(begun)]
