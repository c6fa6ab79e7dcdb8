"""The learning rate from step to step, and weight decay: what it reaches, by what a parameter is for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import hf_config

from e2p_jax.backbone import lora
from e2p_jax.backbone.adapter import Adapter
from e2p_jax.backbone.families import FAMILIES, parse_config
from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.backbone.weights import abstract
from e2p_jax.config import TrainConfig
from e2p_jax.prefix import blocks, linear, mlp
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.prefix.projector import Projector
from e2p_jax.train.optimizer import decays, make_optimizer, schedule
from e2p_jax.train.partition import path_name, split, trainable_mask

EVERYTHING = ("backbone/**", "projector/**", "lora/**")


def decoder_config(family: str) -> DecoderConfig:
    return parse_config(hf_config(family).to_dict(), Path("config.json"))


def whole(config: DecoderConfig) -> tuple[Any, Any]:
    """Shapes of all parameters that there may be in front of a backbone, and the mask that trains them."""
    sizes = {"embedding_width": 4, "model_width": config.hidden_size}

    def parts() -> tuple[Projector, Adapter]:
        made = Projector(mlp.Settings(hidden_size=8), **sizes, null_user_rate=0.1, rngs=nnx.Rngs(0))
        return made, Adapter(config, lora.Settings(rank=2), rngs=nnx.Rngs(0))

    projector, adapter = nnx.eval_shape(parts)
    model = PrefixModel(abstract(config, dtype=jnp.dtype("float32")), projector, "lora", adapter)
    return nnx.to_pure_dict(nnx.state(model)), trainable_mask(model, EVERYTHING)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_one_role(family: str) -> None:
    """In one layer a matrix has two axes; norms, biases and the null user have one. Experts' have one more."""
    params, mask = whole(decoder_config(family))
    leaves = jax.tree_util.tree_leaves_with_path(split(params, mask)[0])
    stacked = ("/layers/", "/expert_")
    found = {path_name(path): leaf.ndim - sum(part in path_name(path) for part in stacked) for path, leaf in leaves}
    assert len(found) > 20
    reached = {path_name(path): decays(path_name(path), leaf.ndim) for path, leaf in leaves}
    assert reached == {path: ndim > 1 for path, ndim in found.items()}


def test_a_parameter_without_a_role_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"parameter backbone/layers/gain has the roles \[\]; give it one in e2p_jax.train"
    ):
        decays("backbone/layers/gain", 2)


def test_without_a_gradient_norms_and_biases_stay_and_matrices_shrink() -> None:
    params, mask = whole(decoder_config("gpt2"))
    trainable, _ = split(jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params), mask)
    config = TrainConfig(learning_rate=0.5, weight_decay=0.1, warmup_steps=0)
    optimizer = make_optimizer(config, mask, params)

    @jax.jit
    def step(trainable: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, trainable), optimizer.init(trainable), trainable)
        return optax.apply_updates(trainable, updates)

    after = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(step(trainable))}
    assert {"backbone/layers/attention_norm", "backbone/layers/q_bias", "backbone/final_norm_bias"} < after.keys()
    for path, leaf in after.items():
        np.testing.assert_allclose(leaf, 0.95 if decays(path, leaf.ndim) else 1.0, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("given", [0.0, 0.25])
@pytest.mark.parametrize("kind", [linear, mlp, blocks])
@pytest.mark.parametrize("trainable", ["projector/**", "projector/bias"])
def test_a_bias_moves_the_mean_vector_as_far_as_the_matrices_move_another(
    kind: Any, trainable: str, given: float
) -> None:
    """One step of Adam where every gradient is 1: sqrt(E) times as far, E of a block's vector; alone, too; or as given.
    Shared tokens are as the bias.
    """
    settings = kind.Settings(num_tokens=3, shared_tokens=1)
    made = Projector(settings, embedding_width=18, model_width=3, rngs=nnx.Rngs(0))
    model = PrefixModel(abstract(decoder_config("llama"), dtype=jnp.dtype("float32")), made)
    params, mask = nnx.to_pure_dict(nnx.state(model)), trainable_mask(model, (trainable,))
    learned, _ = split(params, mask)
    config = TrainConfig(learning_rate=0.5, bias_learning_rate=given, weight_decay=0.0, warmup_steps=0)
    optimizer = make_optimizer(config, mask, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, learned), optimizer.init(learned), learned)
    moved = {path_name(path): np.unique(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}
    read = 9 if kind is blocks else 18
    assert ("projector/skip" in moved) == ("projector/shared" in moved) == (trainable == "projector/**")
    for path, by in moved.items():
        shared = path in ("projector/bias", "projector/shared")
        expected = 0.5 if not shared else given or 0.5 * read**0.5
        np.testing.assert_allclose(by, [-expected], rtol=1e-5, err_msg=path)


def test_the_rate_warms_up_and_ends_at_its_share_of_the_peak() -> None:
    rate = schedule(TrainConfig(steps=20, warmup_steps=4, learning_rate=0.5, final_learning_rate=0.1))
    rates = [float(rate(step)) for step in (0, 2, 4, 12, 20, 30)]
    assert rates == pytest.approx([0.0, 0.25, 0.5, (0.5 + 0.05) / 2, 0.05, 0.05])  # half of the cosine is the mean
