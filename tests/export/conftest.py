"""Short runs in front of the tiny backbone, one per way a prefix can be made and placed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from e2p_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    PrefixConfig,
    TrainConfig,
)
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.prefix import mlp
from e2p_jax.train.loop import train
from e2p_jax.train.run import Run, open_run
from e2p_jax.vectors.table import save_table

USERS = range(30)


@pytest.fixture(scope="session")
def lively_backbone(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone with weights so large that every prompt and prefix gets an answer of its own.

    Its heads are twice as wide: vLLM's attention on processors takes none below 32.
    """
    out = tmp_path_factory.mktemp("lively") / "backbone"
    shutil.copytree(tiny_backbone, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"head_dim": 2 * config["head_dim"]}))
    rng = np.random.default_rng(0)
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            wide = (1, 2) if "o_proj" in name else (2, 1) if "self_attn" in name else (1, 1)
            tensors[name] = (0.4 * rng.normal(size=np.multiply(tensor.shape, wide))).astype(np.float32)
    safetensors.numpy.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="session")
def make_run(lively_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """(placement, tokens, kind, template, null user rate, shared tokens) -> a short run, trained once a session."""
    folder = tmp_path_factory.mktemp("export")
    write_jsonl([synthetic.record(user) for user in USERS], folder / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="synthetic", version="1")
    made: dict[tuple, Run] = {}

    def make(
        placement: str = "after_bos",
        num_tokens: int = 1,
        kind: str = "mlp",
        template: str = "auto",
        null: float = 0.0,
        shared: int = 0,
    ) -> Run:
        key = (placement, num_tokens, kind, template, null, shared)
        if key not in made:
            config = Config(
                backbone=BackboneConfig(path=str(lively_backbone)),
                data=DataConfig(
                    path=str(folder / "records.jsonl"),
                    embeddings=str(folder / "table"),
                    seq_len=256,
                    chat_template=template,
                ),
                prefix=PrefixConfig(placement),
                projector=mlp.Settings(kind=kind, num_tokens=num_tokens, shared_tokens=shared, hidden_size=16),
                train=TrainConfig(steps=3, rows=4, warmup_steps=1, learning_rate=0.01, null_user_rate=null),
                evaluate=EvaluateConfig(conditions=("none", "e2p")),
            )
            made[key] = open_run(train(config, folder / f"run-{len(made)}"), "last")
        return made[key]

    return make
