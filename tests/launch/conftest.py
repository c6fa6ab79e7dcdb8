"""A small run, and the environment in which launchers start it as processes of two devices."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from xla_flags import xla_flags

from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, TrainConfig
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.prefix import mlp
from e2p_jax.vectors.table import save_table

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def config(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two steps on 16 users, started from words: what every process works out is to be the same."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl([synthetic.record(user) for user in range(16)], folder / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in range(16)])
    save_table(folder / "table", [f"user-{user}" for user in range(16)], vectors, name="synthetic", version="1")
    return Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(path=str(folder / "records.jsonl"), embeddings=str(folder / "table"), seq_len=128),
        projector=mlp.Settings(hidden_size=16, start="words"),
        train=TrainConfig(steps=2, rows=4, warmup_steps=1, eval_every=2, checkpoint_every=2, log_every=1),
        evaluate=EvaluateConfig(conditions=()),
    )


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What processes started by a test inherit."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", xla_flags(devices=2))
    monkeypatch.setenv("E2P", f"{sys.executable} -m e2p_jax")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_NUM", "JAX_PROC"))]:
        monkeypatch.delenv(name)
    return monkeypatch
