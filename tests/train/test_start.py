"""Beginning with another run's projector: it is that one's, its statistics too, and what does not fit is refused."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from e2p_jax.config import BackboneConfig, Config, DataConfig, TrainConfig, from_json
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.errors import UserError
from e2p_jax.prefix import linear, mlp
from e2p_jax.train.loop import train
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.run import open_run
from e2p_jax.vectors.table import save_table

USERS = range(24)
STEPS = {"steps": 2, "warmup_steps": 0, "eval_every": 2}


@pytest.fixture(scope="module")
def config(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of the first users; `later.jsonl` is of others, whose vectors have another mean."""
    folder = tmp_path_factory.mktemp("start")
    for name, users in ("records", USERS[:16]), ("later", USERS[12:]):
        write_jsonl([synthetic.record(user) for user in users], folder / f"{name}.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="t", version="1")
    return Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(
            path=str(folder / "records.jsonl"),
            embeddings=str(folder / "table"),
            seq_len=128,
            eval_splits=("train",),
        ),
        projector=mlp.Settings(hidden_size=16, num_tokens=3, shared_tokens=1),
        train=TrainConfig(rows=4, learning_rate=0.05, log_every=1, **STEPS),
    )


@pytest.fixture(scope="module")
def first(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(train(config, tmp_path_factory.mktemp("first") / "run"))


def later(config: Config, start: Path | str, **sections: dict) -> Config:
    """Other data, and the shared part alone trained."""
    path = str(Path(config.data.path).with_name("later.jsonl"))
    named = {"trainable": ("projector/bias", "projector/shared")} | sections.pop("train", {})
    projector = {"start": str(start), "dropout": 0.5} | sections.pop("projector", {})
    return config.change(data={"path": path}, projector=projector, train=named, **sections)


def test_what_is_not_trained_stays_what_it_was_in_the_other_run(config: Config, first: Path, tmp_path: Path) -> None:
    """To the last bit, the statistics of the first run's users as well; and the first run is only read."""
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    run = train(later(config, first), tmp_path / "run")
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    then, now = open_run(first).model.params["projector"], open_run(run).model.params["projector"]
    same = {name for name, value in now.items() if np.array_equal(value, then[name])}
    assert now.keys() - same == {"bias", "shared"}
    fresh = open_run(train(later(config, "random"), tmp_path / "fresh")).model.params["projector"]
    assert not np.array_equal(fresh["input_mean"], now["input_mean"])


def test_the_first_step_is_where_the_other_run_ended(config: Config, first: Path, tmp_path: Path) -> None:
    """With a rate of next to nothing the split keeps the NLL of the first run; and the new one
    starts from the best checkpoint, resumes, and needs the first run no more.
    """
    still = dataclasses.replace(later(config, first, train={"learning_rate": 1e-12}), data=config.data)
    run = train(still, tmp_path / "run")
    then, now = (
        [line["eval/train/nll"] for line in read_metrics(place / "metrics.jsonl") if "eval/train/nll" in line]
        for place in (first, run)
    )
    assert now and now == pytest.approx(then, rel=1e-6)

    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    config = later(config, moved)
    whole = train(config, tmp_path / "whole")
    numbers = read_metrics(whole / "metrics.jsonl")
    shutil.rmtree(moved)
    assert train(config, whole) == whole and read_metrics(whole / "metrics.jsonl") == numbers
    assert from_json((whole / "config.json").read_bytes(), whole).portable().projector.start == "moved"


def test_what_does_not_fit_is_refused_before_training(
    config: Config, first: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    def refused(changed: Config, message: str) -> None:
        with pytest.raises(UserError, match=message):
            train(changed, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()

    refused(later(config, "word"), r"projector.start is 'word'; choose random, words, or a run directory \(no config")
    other = "set it to the same"
    refused(later(config, first, projector={"num_tokens": 2}), rf"has projector.num_tokens=3, this one 2; {other}")
    refused(later(config, first, projector={"max_scale": 8.0}), rf"has projector.max_scale=4.0, this one 8.0; {other}")
    kind = dataclasses.replace(
        later(config, first), projector=linear.Settings(num_tokens=3, shared_tokens=1, start=str(first))
    )
    refused(kind, rf"has projector.kind=mlp, this one linear; {other}")
    refused(later(config, first, train={"null_user_rate": 0.5}), r"null_user has shape None there, \(\d+,\) here; give")
    wide = np.stack([np.tile(synthetic.vector(user), 2) for user in USERS])
    save_table(tmp_path / "wide", [f"user-{user}" for user in USERS], wide, name="t", version="1")
    refused(
        later(config, first).change(data={"embeddings": str(tmp_path / "wide")}),
        r"input_mean has shape \(\d+,\) there, \(\d+,\) here; give vectors of the same width",
    )

    shutil.copytree(tiny_backbone, tmp_path / "backbone")
    path = tmp_path / "backbone" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    refused(
        later(config, first, backbone={"path": str(tmp_path / "backbone")}),
        "was trained in front of other weights than",
    )
    shutil.copytree(first, tmp_path / "damaged")
    place = tmp_path / "damaged" / "checkpoints" / "2"
    max(place.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0).write_bytes(b"x")
    refused(later(config, tmp_path / "damaged"), r"damaged/checkpoints/2")
