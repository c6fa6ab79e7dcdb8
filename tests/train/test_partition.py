"""One mask decides what trains: which parameters, what the optimizer holds, and the counts shown at start-up."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import USER_WIDTH, prefix_model

from e2p_jax.config import TrainConfig
from e2p_jax.errors import UserError
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.train.optimizer import make_optimizer
from e2p_jax.train.partition import describe, join, path_name, split, trainable_mask

PROJECTOR = {f"projector/{name}" for name in ("skip", "bias", "up", "up_bias", "down")}
STATISTICS = {f"projector/{name}" for name in ("input_mean", "input_std", "token_mean", "token_std")}


@pytest.fixture(scope="module")
def model() -> PrefixModel:
    return prefix_model()


def leaves(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def chosen(model: PrefixModel, *patterns: str) -> set[str]:
    return {name for name, trains in leaves(trainable_mask(model, patterns)).items() if trains}


def test_by_default_exactly_the_projector_trains(model: PrefixModel) -> None:
    mask = leaves(trainable_mask(model, TrainConfig().trainable))
    parameters = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert mask.keys() == parameters
    assert {name for name, trains in mask.items() if trains} == PROJECTOR
    assert all(isinstance(trains, bool) for trains in mask.values())


def test_patterns(model: PrefixModel) -> None:
    backbone = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model)) if path[0] == "backbone"}
    assert len(backbone) == 12
    assert chosen(model, "backbone/**") == backbone
    assert chosen(model, "**") == backbone | PROJECTOR
    assert chosen(model, "backbone/*") == {"backbone/embedding", "backbone/final_norm", "backbone/head"}
    assert chosen(model, "**/up") == {"backbone/layers/up", "projector/up"}
    assert chosen(model, "backbone/layers/*_norm", "projector/bias") == {
        "backbone/layers/attention_norm",
        "backbone/layers/mlp_norm",
        "projector/bias",
    }


@pytest.mark.parametrize("pattern", ["lora/**", "projector", "projector/u", "projector/.*", "projector/input_mean", ""])
def test_a_pattern_that_matches_nothing_is_refused(model: PrefixModel, pattern: str) -> None:
    """Parts of names, regular expressions and statistics, which never train, match nothing."""
    with pytest.raises(UserError, match=rf"^train\.trainable: pattern {re.escape(repr(pattern))} matches no parameter"):
        trainable_mask(model, ("projector/bias", pattern))


def test_a_double_match_is_refused(model: PrefixModel) -> None:
    message = r"parameter projector/up matches both 'projector/\*\*' and '\*\*/up'"
    with pytest.raises(UserError, match=message):
        trainable_mask(model, ("projector/**", "**/up"))


@pytest.mark.parametrize("patterns", [("projector/**",), ("backbone/**",), ("**",), ("**/up", "projector/bias")])
def test_join_undoes_split(model: PrefixModel, patterns: tuple[str, ...]) -> None:
    params, mask = nnx.to_pure_dict(nnx.state(model)), trainable_mask(model, patterns)
    trainable, frozen = split(params, mask)
    assert leaves(trainable).keys() == chosen(model, *patterns)
    assert leaves(trainable).keys().isdisjoint(leaves(frozen))
    joined = join(trainable, frozen, mask)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("whole", [False, True])
def test_the_optimizer_holds_nothing_for_the_frozen_part(model: PrefixModel, whole: bool) -> None:
    """Given the trainable part, as `train` does, or all parameters, where the mask alone decides."""
    params, mask = nnx.to_pure_dict(nnx.state(model)), trainable_mask(model, ("projector/**",))
    trainable, _ = split(params, mask)
    state = jax.eval_shape(make_optimizer(TrainConfig(), mask, params).init, params if whole else trainable)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert trained == USER_WIDTH * 24 + 24 + 24 * 32 + USER_WIDTH * 32 + 32
    held = leaves(state)
    assert not any("backbone" in name or name.split("/")[-1] in STATISTICS for name in held)
    counters = sum(leaf.size for leaf in held.values() if leaf.ndim == 0)
    assert sum(leaf.size for leaf in held.values()) == 2 * trained + counters  # two moments
    assert counters <= 3


def test_weight_decay_is_for_matrices(model: PrefixModel) -> None:
    """Without a gradient AdamW is decay alone: matrices shrink by rate times decay, vectors stay."""
    params, mask = nnx.to_pure_dict(nnx.state(model)), trainable_mask(model, ("projector/**",))
    trainable, _ = split(params, mask)
    trainable = jax.tree.map(lambda p: jnp.ones_like(p), trainable)
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0, steps=10)
    optimizer = make_optimizer(config, mask, params)
    no_gradient = jax.tree.map(jnp.zeros_like, trainable)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(lambda p: optimizer.update(no_gradient, optimizer.init(p), p))(trainable)
    for name, value in leaves(optax.apply_updates(trainable, updates)).items():
        np.testing.assert_allclose(value, 0.95 if value.ndim > 1 else 1.0, rtol=1e-6)
        assert value.ndim == (1 if name.endswith("bias") else 2)


def test_describe_counts_parameters_and_bytes(model: PrefixModel) -> None:
    params = nnx.to_pure_dict(nnx.state(model))
    params["backbone"] = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["backbone"])
    text = describe(params, trainable_mask(model, ("projector/**",)))
    total = sum(leaf.size for leaf in jax.tree.leaves(params["backbone"]))
    statistics = 2 * USER_WIDTH + 2 * 32
    trained = sum(leaf.size for leaf in jax.tree.leaves(params["projector"])) - statistics
    mebibytes = (2 * total + 4 * statistics) / 2**20
    assert text == (
        f"trainable {trained:,} parameters ({4 * trained / 2**20:,.1f} MiB), "
        f"frozen {total + statistics:,} parameters ({mebibytes:,.1f} MiB)"
    )
