"""What a token costs user by user: against plain NumPy, and what the loop says of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, TrainConfig
from e2p_jax.data.training import read_training
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.prefix import mlp
from e2p_jax.train import beyond
from e2p_jax.train.beyond import Beyond
from e2p_jax.train.loop import train
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.run import open_run
from e2p_jax.train.score import Scores
from e2p_jax.vectors.table import save_table


def scores(nll: np.ndarray, targets: np.ndarray) -> Scores:
    return Scores(np.atleast_2d(nll), targets, targets, targets)


def test_users_are_told_apart_and_the_worst_is_named() -> None:
    rng = np.random.default_rng(0)
    owner, targets = rng.integers(0, 9, 60), rng.integers(5, 50, 60)
    users = [f"u{n}" for n in owner]
    none = rng.normal(4, 0.5, 60) * targets
    drawn = none + targets * rng.normal(0, 0.05, (3, 60))
    drawn[1] += targets * 2.5 * (owner == 4)  # one user, in one of three derangements
    found = Beyond.of(scores(drawn, targets), scores(none, targets), users)
    assert found.users == [f"u{n}" for n in range(9)] and found.nats.shape == (3, 9)
    for draw in range(3):
        for user in range(9):
            mine = owner == user
            expected = (drawn[draw, mine] - none[mine]).sum() / targets[mine].sum()
            assert found.nats[draw, user] == pytest.approx(expected)
    assert found.broken == 1 and found.worst(1) == [("u4", found.nats[1, 4])]
    assert [nats for _, nats in found.worst(9)] == sorted(found.nats.max(axis=0), reverse=True)
    values = found.to_dict()
    assert values["percentiles"] == pytest.approx(np.quantile(found.nats, np.linspace(0, 1, 101)))
    assert values["broken"] == 1 and len(values["worst"]) == 9 and values["worst"][0]["user_id"] == "u4"
    warning = found.warning()
    assert warning is not None and "breaks the model for 1 of 9 users" in warning and "worst: 'u4' +2.5" in warning
    assert Beyond.of(scores(none + 0.2 * targets, targets), scores(none, targets), users).warning() is None


def test_the_loop_names_dev_users_whose_token_breaks_the_model(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the numbers that `evaluate` finds, also after a resume; and not where nothing is a moving baseline."""
    write_jsonl([synthetic.record(user) for user in range(16)], tmp_path / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in range(16)])
    save_table(tmp_path / "table", [f"user-{user}" for user in range(16)], vectors, name="synthetic", version="1")
    config = Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(path=str(tmp_path / "records.jsonl"), embeddings=str(tmp_path / "table"), seq_len=128),
        projector=mlp.Settings(hidden_size=16, init_scale=30.0, max_scale=0.0),
        train=TrainConfig(steps=2, rows=4, warmup_steps=1, eval_every=1, checkpoint_every=1),
        evaluate=EvaluateConfig(conditions=()),
    )
    monkeypatch.setattr(beyond, "BREAKS", -10.0)  # every token does
    run = train(config, tmp_path / "run")
    said = capsys.readouterr().err
    opened = open_run(run, "last")
    dev = read_training(config, opened.inputs.encoder).dev
    (values,) = [evaluate(opened, dev, "dev", ["none", "e2p"]).to_dict()["beyond_none"]["e2p"]]
    (mean,) = [evaluate(opened, dev, "dev", ["none", "mean"]).to_dict()]
    last = [line for line in read_metrics(run / "metrics.jsonl") if "eval/dev/nll" in line][-1]
    assert last["eval/dev/broken_users"] == len(dev) == values["broken"]
    assert last["eval/dev/broken"] == {
        user["user_id"]: pytest.approx(user["nats"], abs=1e-5) for user in values["worst"]
    }
    assert last["eval/dev/worst_user"] == pytest.approx(values["worst"][0]["nats"], abs=1e-5)
    first = values["worst"][0]
    assert f"step 2, dev: the token breaks the model for {len(dev)} of {len(dev)} users" in said
    assert f"worst: '{first['user_id']}' {first['nats']:+.2f}" in said
    per_target = {c: v["nll_per_target"] for c, v in mean["conditions"].items()}
    assert last["eval/dev/mean_vector"] == pytest.approx(per_target["mean"] - per_target["none"], abs=1e-5)
    assert said.count("the mean of all users' vectors breaks the model") == 1  # at the last step alone

    lines = read_metrics(run / "metrics.jsonl")
    train(config.change(train={"steps": 3}), run)
    again = read_metrics(run / "metrics.jsonl")
    assert again[: len(lines)] == lines and again[-1]["eval/dev/broken_users"] == len(dev)
    settings = dataclasses.replace(config.train, trainable=("projector/**", "backbone/**"), steps=1, warmup_steps=0)
    trained = train(dataclasses.replace(config, train=settings), tmp_path / "trained")
    assert not any("eval/dev/worst_user" in line for line in read_metrics(trained / "metrics.jsonl"))
