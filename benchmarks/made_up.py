"""A random Llama behind a projector, rows of random tokens, and the compiled step on them: no torch, no files."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import DecoderConfig, parse_config
from e2p_jax.backbone.layout import Execution
from e2p_jax.backbone.weights import quantize_layers
from e2p_jax.config import MeshConfig, TrainConfig
from e2p_jax.data.packing import Budget, empty_rows, longest_of
from e2p_jax.parallel.mesh import make_mesh
from e2p_jax.prefix import mlp
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.prefix.projector import Projector
from e2p_jax.train.partition import trainable_mask
from e2p_jax.train.setup import Model, initial_state, jit_train_step

WIDTH = 64  # of the user vectors


def llama(width: int, hidden: int, layers: int, heads: int, vocabulary: int) -> DecoderConfig:
    values = {"model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": hidden}
    values |= {"num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 8192}
    return parse_config({**values, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}, Path("config.json"))


def random_model(config: DecoderConfig, remat: bool = False, quantization: Any = "none") -> Model:
    """In float32, on one CPU device."""
    backbone = Decoder(config, dtype=jnp.dtype("float32"), execution=Execution(remat=remat), rngs=nnx.Rngs(0))
    if quantization != "none":
        quantize_layers(backbone, quantization)
    projector = Projector(
        mlp.Settings(num_tokens=1, hidden_size=512, dropout=0.0),
        embedding_width=WIDTH,
        model_width=config.hidden_size,
        rngs=nnx.Rngs(1),
    )
    whole = PrefixModel(backbone, projector)
    graph, state = nnx.split(whole)
    mask = trainable_mask(whole, TrainConfig().trainable)
    return Model(make_mesh(MeshConfig()), graph, nnx.to_pure_dict(state), mask, "random")


def random_rows(rows: int, length: int, users: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Full rows of `users` examples of one length, each behind its slot; every second token is a target."""
    batch = empty_rows(rows, Budget(length, length // 2, users, longest=longest_of(length // users, length)), WIDTH)
    rng, each = np.random.default_rng(0), length // users
    batch["tokens"][:] = rng.integers(0, vocabulary, (rows, length))
    batch["positions"][:] = np.arange(length) % each
    batch["segment_ids"][:] = np.arange(length) // each + 1
    batch["slots"][:, ::each] = np.arange(users)
    batch["user_embeddings"][:] = rng.standard_normal(batch["user_embeddings"].shape)
    batch["target_positions"][:] = np.arange(0, length, 2)
    batch["target_ids"][:] = batch["tokens"][:, 1::2]
    batch["target_weights"][:] = 1
    return batch


class Step:
    """The compiled train step on one batch, which it repeats."""

    def __init__(self, model: Model, batch: dict[str, np.ndarray]):
        settings = TrainConfig(rows=len(batch["tokens"]))
        self.mesh = model.mesh
        self.batch = jax.device_put(batch)
        with jax.set_mesh(self.mesh):
            self.state, self.frozen = initial_state(model, settings)
            self.compiled = jit_train_step(model, settings).lower(self.state, self.frozen, self.batch).compile()

    def __call__(self) -> float:
        """Returns the loss, nats per target, when the step is done."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        return float(metrics.loss)
