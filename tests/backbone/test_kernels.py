"""Kernels of accelerators: splash in Pallas's interpreter, and compiled for a TPU where its compiler is installed."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
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

from e2p_jax.backbone import kernels
from e2p_jax.backbone.attention import attention, choose, visibility
from e2p_jax.backbone.families import parse_config
from e2p_jax.backbone.kernels import cudnn_attention, packed_layout, splash_attention
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
    index = jnp.arange(q.shape[1])[None]
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


@functools.partial(jax.jit, static_argnames=("window", "scale"))
def attend_or_pull(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, out: jax.Array | None, *, window: int, scale: float
) -> tuple[jax.Array, ...]:
    """What attention says, or given its gradient those of queries, keys and values."""
    index = jnp.arange(q.shape[1])[None]
    visible = visibility(segments, segments, index, index)
    mixed, pull = jax.vjp(lambda q, k, v: attention(q, k, v, visible, window, scale=scale), q, k, v)
    return (mixed,) if out is None else pull(out)


class _CuDNN:
    """Stands in for cuDNN's attention of packed rows: what it says of itself that it does with pointers and lengths."""

    def __init__(self, backward: bool):
        self.backward = backward

    def bind(self, q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array, **options: Any) -> list[jax.Array]:
        _, lengths, _, q_starts, kv_starts, _, _, *given = rest
        assert options["mask_type"].name == "PADDING_CAUSAL"
        batch, length, heads, _ = q.shape
        sequences = batch * lengths.shape[1]
        if self.backward:
            statistics, _, out_grad = given
            assert statistics.shape == (sequences, heads, length)
        out = [np.full(x.shape, np.nan, np.float32).reshape(-1) for x in ((q, k, v) if self.backward else (q,))]
        for number in range(sequences):
            count = int(lengths.ravel()[number])
            if not count:
                continue
            first, kv_first = int(q_starts.ravel()[number]), int(kv_starts.ravel()[number])

            def part(x: jax.Array, first: int, count: int = count) -> np.ndarray:
                rows = np.zeros((1, length, *x.shape[2:]), np.float32)  # behind its own zeros: one shape for all
                rows[0, :count] = np.ravel(x)[first : first + count * rows[0, 0].size].reshape(rows[0, :count].shape)
                return rows

            segment = np.where(np.arange(length) < count, 1, 2).astype(np.int32)[None]
            inputs = part(q, first), part(k, kv_first), part(v, kv_first)
            settings = {"window": options["sliding_window_length"] or 0, "scale": options["scale"]}
            given_out = part(out_grad, first) if self.backward else None
            places, results = (first, kv_first, kv_first), attend_or_pull(*inputs, segment, given_out, **settings)
            results = [np.asarray(x)[0, :count] for x in results]
            for into, place, result in zip(out, places, results, strict=False):
                into[place : place + result.size] = np.ravel(result)
        whole = [jnp.asarray(x.reshape(y.shape)) for x, y in zip(out, (q, k, v), strict=False)]
        training = options.get("is_training")
        return whole + [jnp.zeros((sequences, heads, length))] * bool(training and not self.backward)


@pytest.mark.parametrize(("window", "longest", "shape"), [(0, None, (3, 9)), (40, None, (3, 9)), (40, 32, (12, 5))])
def test_cudnn_is_told_where_segments_lie(
    window: int, longest: int | None, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of the reference come out where each piece is found, grouped heads and padding included,
    whether rows come as they are or cut into ones as long as the longest segment.
    """
    _, _, common = kernels.cudnn_primitives()
    monkeypatch.setattr(kernels, "cudnn_primitives", lambda: (_CuDNN(False), _CuDNN(True), common))
    q, k, v, out, segments = rows(batch=3, length=128)
    if longest:
        segments = jnp.minimum(jnp.arange(128) // 30 + 1, 4)[None] * jnp.array([[1], [1], [0]])  # 30, 30, 30 and 38
        segments = segments.at[0, 110:].set(0).at[1, 31:].set(0)  # pieces across the cuts, and padding of all lengths
    else:
        segments = segments.at[0].set(1).at[1, :100].set(2)  # one whole, one of two pieces, one of four
    index = jnp.arange(q.shape[1])[None]
    visible = visibility(segments, segments, index, index)
    layout = packed_layout(segments, 4 if longest else 3, longest)
    assert layout.shape == shape

    ours = functools.partial(cudnn_attention, layout=layout, window=window, windows=(window,), scale=0.3)
    reference = functools.partial(attention, visible=visible, window=window, scale=0.3)
    live = segments[..., None, None] > 0  # what padding says nobody reads, but it is a number
    assert np.isfinite(ours(q, k, v)).all()
    np.testing.assert_allclose(jnp.where(live, ours(q, k, v), 0), jnp.where(live, reference(q, k, v), 0), atol=2e-6)
    out = jnp.where(live, out, 0)
    for one, other in zip(jax.vjp(ours, q, k, v)[1](out), jax.vjp(reference, q, k, v)[1](out), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def config(**changes: Any) -> Any:
    return parse_config({**SIZES, "model_type": "llama", "rms_norm_eps": 1e-5, **changes}, Path("config.json"))


def device(name: str) -> Any:
    """`gpu:9.0` is one of that compute capability."""
    platform, _, capability = name.partition(":")
    return SimpleNamespace(platform=platform, compute_capability=capability)


has_tokamax = importlib.util.find_spec("tokamax") is not None


@pytest.mark.parametrize(
    ("kind", "place", "cap", "dtype", "chosen"),
    [
        ("auto", "tpu", 0.0, "bfloat16", "splash"),
        ("auto", "cpu", 0.0, "float32", "xla"),
        ("xla", "tpu", 0.0, "bfloat16", "xla"),
        ("auto", "gpu:9.0", 0.0, "bfloat16", "cudnn"),
        ("auto", "gpu:10.0", 0.0, "float16", "cudnn"),
        ("auto", "gpu:8.0", 0.0, "bfloat16", "xla"),
        ("auto", "gpu:9.0", 0.0, "float32", "xla"),
        ("auto", "gpu:9.0", 30.0, "bfloat16", "mosaic" if has_tokamax else "xla"),
        ("cudnn", "gpu:9.0", 0.0, "bfloat16", "cudnn"),
    ],
)
def test_choice(kind: Any, place: str, cap: float, dtype: str, chosen: str) -> None:
    assert choose("auto", device(place), dataclasses.replace(config(), sinks=True), jnp.dtype(dtype)) == "xla"
    assert choose(kind, device(place), dataclasses.replace(config(), attention_cap=cap), jnp.dtype(dtype)) == chosen


@pytest.mark.parametrize(
    ("kind", "place", "changes", "dtype", "message"),
    [
        ("splash", "cpu", {}, "bfloat16", "backbone.attention=splash needs a TPU, here is cpu; set it to auto"),
        ("cudnn", "tpu", {}, "bfloat16", "backbone.attention=cudnn needs a GPU"),
        ("cudnn", "gpu:9.0", {"attention_cap": 30.0}, "bfloat16", "has no soft cap"),
        ("cudnn", "gpu:8.0", {}, "bfloat16", "needs Hopper or newer .* here is 8.0"),
        ("mosaic", "gpu:9.0", {}, "float32", "multiplies bfloat16 alone, and backbone.dtype is float32"),
        *(
            (kind, place, {"sinks": True}, "bfloat16", f"attention={kind} has no attention sinks, .*; set it to auto")
            for kind, place in (("splash", "tpu"), ("cudnn", "gpu:9.0"), ("mosaic", "gpu:9.0"))
        ),
        ("cudnn", "gpu:9.0", {"head_dim": 20}, "bfloat16", "multiples of 8 up to 256, and this backbone's are 20"),
    ],
)
def test_refused_choice(kind: Any, place: str, changes: dict[str, Any], dtype: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(kind, device(place), dataclasses.replace(config(), **changes), jnp.dtype(dtype))


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
