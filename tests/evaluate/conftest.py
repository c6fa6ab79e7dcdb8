"""Texts that were said and generated; a run that learned its users by heart."""

from pathlib import Path

import numpy as np
import pytest

from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, ProjectorConfig, TrainConfig
from e2p_jax.data import synthetic
from e2p_jax.data.embeddings import save_table
from e2p_jax.data.records import Record, write_jsonl
from e2p_jax.train.loop import train

SAID = ["the cat sat on the mat .", "i have a small dog at home and two cats", "the police killed the gunman", "hello"]
GENERATED = ["the cat is on the mat .", "i have a dog at home and a cat", "police kill the gunman", "good morning"]
LEARNED = range(24)


@pytest.fixture
def talk_records() -> tuple[list[str], list[Record]]:
    """Four replies, and the records whose last turns they stand for."""
    question = {"role": "user", "content": "?"}
    said = [Record(f"u{n}", (), (question, {"role": "assistant", "content": text})) for n, text in enumerate(SAID)]
    return GENERATED, said


@pytest.fixture(scope="session")
def learned_run(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Projector and tiny backbone trained until a user's own vector tells what the user says; evaluated on the same."""
    folder = tmp_path_factory.mktemp("learned")
    write_jsonl([synthetic.record(user) for user in LEARNED], folder / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in LEARNED])
    save_table(folder / "table", [f"user-{user}" for user in LEARNED], vectors, name="synthetic", version="1")
    config = Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(
            path=str(folder / "records.jsonl"),
            embeddings=str(folder / "table"),
            train_split="all",
            eval_splits=("all",),
            seq_len=128,
        ),
        projector=ProjectorConfig(hidden_size=16, dropout=0.0),
        train=TrainConfig(
            trainable=("projector/**", "backbone/**"),
            steps=150,
            rows=8,
            learning_rate=1e-2,
            warmup_steps=5,
            eval_every=50,
            checkpoint_every=150,
        ),
        evaluate=EvaluateConfig(bootstrap_samples=200, prompts=("do you have any pets?",)),
    )
    return train(config, folder / "run")
