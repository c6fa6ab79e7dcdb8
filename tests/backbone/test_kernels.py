"""Kernels of accelerators: splash in Pallas's interpreter, and compiled for a TPU where its compiler is installed."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import LLAMA3, SIZES, mesh_of, prefix_model, random_batch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from e2p_jax.backbone.attention import attention, choose, visibility, within
from e2p_jax.backbone.families import parse_config
from e2p_jax.backbone.kernels import cudnn_attention, splash_attention
from e2p_jax.backbone.layout import Execution
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import AXES, on_each_device, param_sharding, row_sharding
from e2p_jax.train.partition import path_name, split, trainable_mask
from e2p_jax.train.step import TrainState, make_train_step


def rows(batch: int = 2, length: int = 256, heads: int = 4, groups: int = 2) -> tuple[jax.Array, ...]:
    """Queries, keys, values, what the output is weighed with, and segment ids with padding at the end."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(batch, length, n, 16)).astype(np.float32) for n in (heads, groups, groups, heads)]
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)
    segments[:, -20:] = 0
    return *map(jnp.asarray, arrays), jnp.asarray(segments)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4}], ids=str)
def test_splash_is_attention(mesh: dict[str, int] | None) -> None:
    """Values and gradients, for every window that occurs; four devices' heads do not divide two keys and stay whole."""
    q, k, v, out, segments = rows()
    index = jnp.arange(q.shape[1])
    visible = visibility(segments, segments, index, index)

    attend = on_each_device(
        functools.partial(splash_attention, windows=(0, 40, 5000), scale=0.3, cap=2.0, interpret=True)
    )

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array) -> jax.Array:
        return jnp.sum(out * attend(q, k, v, segments, window))

    def reference(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array) -> jax.Array:
        return jnp.sum(out * attention(q, k, v, visible, window, scale=0.3, cap=2.0))

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh_of(**mesh)):
        ours_grad, reference_grad = (jax.jit(jax.value_and_grad(f, (0, 1, 2))) for f in (ours, reference))
        values = set()
        for window in (0, 40, 5000):
            value, grads = ours_grad(q, k, v, jnp.int32(window))
            expected, expected_grads = reference_grad(q, k, v, jnp.int32(window))
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            for a, b in zip(grads, expected_grads, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
            values.add(round(float(value), 2))
    assert len(values) == 2  # the window of 40 hides something, that of 5000 nothing


def test_cudnn_is_asked_for_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arguments, given to JAX's own attention on a machine without the card."""
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", functools.partial(_without_card, function=jax.nn.dot_product_attention)
    )
    q, k, v, _, segments = rows(length=128)
    index = jnp.arange(q.shape[1])
    visible = visibility(segments, segments, index, index)
    ours = cudnn_attention(q, k, v, within(visible, 40), scale=0.3)
    np.testing.assert_allclose(ours, attention(q, k, v, visible, 40, scale=0.3), atol=2e-6)


def _without_card(*arrays: jax.Array, implementation: str, function: Any, **options: Any) -> jax.Array:
    assert implementation == "cudnn"
    return function(*arrays, implementation="xla", **options)


def config(**changes: Any) -> Any:
    return parse_config({**SIZES, "model_type": "llama", "rms_norm_eps": 1e-5, **changes}, Path("config.json"))


@pytest.mark.parametrize(
    ("kind", "platform", "chosen"),
    [
        ("auto", "tpu", "splash"),
        ("auto", "gpu", "xla"),
        ("auto", "cpu", "xla"),
        ("xla", "tpu", "xla"),
        ("cudnn", "gpu", "cudnn"),
    ],
)
def test_choice(kind: Any, platform: str, chosen: str) -> None:
    assert choose(kind, platform, config()) == chosen


@pytest.mark.parametrize(
    ("kind", "platform", "cap", "message"),
    [
        ("splash", "cpu", 0.0, "backbone.attention=splash needs a TPU, here is cpu; set it to auto"),
        ("cudnn", "tpu", 0.0, "backbone.attention=cudnn needs a GPU"),
        ("cudnn", "gpu", 30.0, "has no soft cap"),
    ],
)
def test_refused_choice(kind: Any, platform: str, cap: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(kind, platform, dataclasses.replace(config(), attention_cap=cap))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler (libtpu) is not installed")
def test_train_step_for_a_tpu_calls_splash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, and both kernels of the backward pass, in the step compiled for four chips that are not here."""
    from jax.experimental import topologies

    for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setitem(os.environ, name, {"TPU_SKIP_MDS_QUERY": "1"}.get(name, "v5litepod-4"))
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, 2, 2), AXES)
    model = prefix_model(head_dim=128, rope_scaling=LLAMA3, execution=Execution(True, "splash"))
    mask = trainable_mask(model, ("projector/**",))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)

    def shape(path: tuple, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param_sharding(mesh, path_name(path), leaf.shape))

    trainable, frozen = split(jax.tree_util.tree_map_with_path(shape, params), mask)
    optimizer = optax.masked(optax.sgd(1.0), mask)
    step = make_train_step(graph, mask, optimizer, lambda _: 1.0, 1)
    whole = NamedSharding(mesh, P())
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        trainable,
        jax.eval_shape(optimizer.init, trainable),
        jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole),
    )
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(mesh)) for name, x in random_batch().items()
    }
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(state, frozen, batch).compile().as_text()
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in text, kernel
