"""Random keys: what is drawn from one is drawn once, and nothing else comes of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import SIZES

from e2p_jax.backbone import lora
from e2p_jax.backbone.families import parse_config
from e2p_jax.config import Config, TrainConfig
from e2p_jax.prefix import mlp
from e2p_jax.prefix.projector import Projector
from e2p_jax.train import setup
from e2p_jax.train.partition import split, trainable_mask
from e2p_jax.train.step import make_train_step


class Toy(nnx.Module):
    """As much of a model as draws something in a step."""

    def __init__(self, projector: Projector):
        self.projector = projector

    def losses(self, batch: Any, key: jax.Array) -> tuple[jax.Array, None]:
        return jnp.sum(self.projector(batch["user_embeddings"], key)), None


def test_no_key_is_drawn_from_twice_or_has_others_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first weights of projector and adapters to the tenth step."""
    drawn: list[bytes] = []
    parents: set[bytes] = set()

    def watched(function: Any, note: Any) -> Any:
        @functools.wraps(function)
        def call(key: jax.Array, *arguments: Any, **more: Any) -> Any:
            note(np.asarray(jax.random.key_data(key)).tobytes())
            return function(key, *arguments, **more)

        return call

    for name in ("normal", "bernoulli", "uniform"):
        monkeypatch.setattr(jax.random, name, watched(getattr(jax.random, name), drawn.append))
    for name in ("fold_in", "split"):
        monkeypatch.setattr(jax.random, name, watched(getattr(jax.random, name), parents.add))
    decoder = parse_config({**SIZES, "model_type": "llama", "rms_norm_eps": 1e-5}, setup.Path("config.json"))
    config = Config(
        adapter=lora.Settings(rank=2),
        projector=mlp.Settings(hidden_size=4, dropout=0.5, noise=0.5),
        train=TrainConfig(null_user_rate=0.5),
    )
    setup._adapter(config, decoder)
    model = Toy(setup._projector(config, decoder, 3))
    graph, values = nnx.split(model)
    mask = trainable_mask(model, ("projector/**",))
    params = nnx.to_pure_dict(values)
    trainable, frozen = split(params, mask)
    parts = setup.Model(None, graph, params, mask, "none")  # type: ignore[arg-type]
    state = setup._fresh_state(parts, config.train, trainable)
    step = make_train_step(graph, mask, optax.masked(optax.sgd(0.0), mask), optax.constant_schedule(0.0), 1)
    state = state._replace(optimizer=optax.masked(optax.sgd(0.0), mask).init(trainable))
    batch = {"user_embeddings": jnp.ones((2, 1, 3)), "target_weights": jnp.ones((2, 1))}
    before = len(drawn)
    for _ in range(10):
        state, _ = step(state, frozen, batch)  # type: ignore[arg-type]
    assert before > 5 and len(drawn) == before + 10 * 3
    assert len(set(drawn)) == len(drawn)
    assert not parents & set(drawn)
