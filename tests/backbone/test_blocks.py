"""Attention by blocks against attention over whole score matrices."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p_jax.backbone.attention import attention, visibility, within
from e2p_jax.backbone.blocks import block_attention, first_blocks
from e2p_jax.parallel.mesh import on_each_device

LENGTH = 384  # three blocks


def packed(*lengths: int) -> list[int]:
    """Segment ids of one row, padding last."""
    row = [n + 1 for n, length in enumerate(lengths) for _ in range(length)]
    return row + [0] * (LENGTH - len(row))


ROWS = [packed(100, 140, 130), packed(384), packed(), packed(127, 1, 129, 2)]


def inputs(groups: int) -> list[jax.Array]:
    """Queries, keys, values, and what the output is weighed with."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(len(ROWS), LENGTH, n, 8)), jnp.float32) for n in (4, groups, groups, 4)]


def whole(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: Any, **options: Any) -> jax.Array:
    index = jnp.arange(q.shape[1])[None]
    return attention(q, k, v, visibility(segments, segments, index, index), window, **options)


HALVED = {"data": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("window", "cap", "groups", "mesh"),
    [
        *((0, 0.0, 2, None), (0, 1.5, 4, None), (1, 0.0, 1, None), (200, 1.5, 1, None)),
        *((0, 1.5, 4, HALVED), (100, 0.0, 2, HALVED), (200, 1.5, 1, HALVED), (100, 0.0, 2, {"data": 4})),
    ],
    ids=str,
)
def test_values_and_gradients(window: int, cap: float, groups: int, mesh: dict[str, int] | None) -> None:
    """On four devices each with two of the rows and half of the heads, but for one group of them; on four with three
    rows, which stay whole.
    """
    rows = 3 if mesh == {"data": 4} else 4
    q, k, v, out = (x[:rows] for x in inputs(groups))
    segments = jnp.asarray(ROWS[:rows], jnp.int32)
    real = jnp.asarray(segments > 0, jnp.float32)[..., None, None]  # what padding sees differs, and is never read

    def value(function: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = function(q, k, v, segments, jnp.int32(window), scale=0.5, cap=cap) * real
        return jnp.sum(mixed * out), mixed

    def by_blocks(*arrays: jax.Array, **options: float) -> jax.Array:
        return on_each_device(functools.partial(block_attention, **options))(*arrays)

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh_of(**mesh)):
        compiled = jax.jit(jax.value_and_grad(lambda *x: value(by_blocks, *x), (0, 1, 2), True))
        (_, ours), grads = compiled(q, k, v)
    (_, theirs), expected = jax.jit(jax.value_and_grad(lambda *x: value(whole, *x), (0, 1, 2), True))(q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2}], ids=str)
def test_a_sink_takes_its_share_of_the_weights(mesh: dict[str, int] | None) -> None:
    """Softmax over one more score, whose key gives nothing; gradients by it, too."""
    q, k, v, out = inputs(2)
    sinks = jnp.asarray([-1.0, 0.0, 2.0, 5.0])
    segments = jnp.asarray(ROWS, jnp.int32)
    out = jnp.where((segments > 0)[..., None, None], out, 0.0)
    index = jnp.arange(LENGTH)[None]
    seen = within(visibility(segments, segments, index, index), 100)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.where(seen[:, None], jnp.einsum("bqhc,bkhc->bhqk", q, k) * 0.5, -1e30)
        own = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)[..., :-1]
        return jnp.sum(jnp.einsum("bhqk,bkhc->bqhc", weights, v) * out)

    def by_blocks(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        attend = on_each_device(functools.partial(block_attention, scale=0.5))
        return jnp.sum(attend(q, k, v, segments, jnp.int32(100), sinks) * out)

    def at_once(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        return jnp.sum(whole(q, k, v, segments, 100, sinks=sinks, scale=0.5) * out)

    arrays, which = (q, k, v, sinks), (0, 1, 2, 3)
    expected = jax.value_and_grad(plain, which)(*arrays)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh_of(**mesh)):
        ours = jax.jit(jax.value_and_grad(by_blocks, which))(*arrays)
    others = [] if mesh else [jax.value_and_grad(at_once, which)(*arrays)]
    for found in (ours, *others):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), found, expected)


def test_padding_is_finite() -> None:
    q, k, v, _ = inputs(2)
    nothing = jnp.zeros((len(ROWS), LENGTH), jnp.int32)
    value, grad = jax.value_and_grad(lambda q: jnp.sum(block_attention(q, k, v, nothing, 0, scale=0.5)))(q)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=2), st.integers(0, 8), st.booleans())
def test_no_visible_block_is_skipped(lengths: list[list[int]], window: int, ordered: bool) -> None:
    """Rows of three blocks of four positions; none is skipped that `visibility` shows something in, and with segments
    in order none is kept in vain.
    """
    rows = np.zeros((len(lengths), 12), np.int32)
    for row, members in enumerate(lengths):
        ids = [n + 1 for n, length in enumerate(members) for _ in range(length)][:12]
        rows[row, : len(ids)] = ids if ordered else ids[::-1]
    segments, index = jnp.asarray(rows), jnp.arange(12)[None]
    visible = np.asarray(visibility(segments, segments, index, index))
    seen = (visible > 0) & ((visible <= window) | (window == 0))
    blocks = seen.reshape(-1, 3, 4, 3, 4).any(axis=(0, 2, 4))
    first = np.asarray(first_blocks(segments, jnp.int32(window), 4))
    assert all(first[i] <= int(np.argmax(blocks[i])) for i in range(3))
    if ordered:
        assert first.tolist() == [int(np.argmax(blocks[i])) for i in range(3)]


def test_blocks_that_nobody_sees_are_not_read() -> None:
    """Forward or backward: what is no number there would spread."""
    q, k, v, out = (x[:1] for x in inputs(2))
    segments = jnp.asarray([packed(128, 256)], jnp.int32)
    k, v = (x.at[:, :128].set(jnp.nan) for x in (k, v))

    def value(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum((block_attention(q, k, v, segments, 0, scale=0.5) * out)[:, 128:])

    result, grads = jax.value_and_grad(value, (0, 1, 2))(q, k, v)
    assert np.isfinite(result)
    assert all(np.isfinite(grad[:, 128:]).all() for grad in grads)


def test_memory_grows_with_length_not_with_its_square() -> None:
    def temporary(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q: jax.Array, segments: jax.Array) -> jax.Array:
            return jnp.sum(block_attention(q, q, q, segments, 0, scale=0.5))

        return jax.jit(jax.grad(loss)).lower(q, segments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.5 * temporary(2048)
