"""Attention and its mask against loops and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p_jax.backbone.attention import TRUNK, attention, visibility

SEGMENTS = st.lists(st.integers(TRUNK, 3), min_size=12, max_size=12)


@settings(max_examples=40, deadline=None)
@given(SEGMENTS, st.sampled_from([0, 4, 11]))
def test_visibility_spelled_out(segments: list[int], first: int) -> None:
    """Queries are the row's positions from `first` on, as when a cache holds the earlier ones."""
    row = jnp.asarray([segments], jnp.int32)
    places = jnp.arange(len(segments))[None]
    visible = np.asarray(visibility(row[:, first:], row, places[:, first:], places))
    for q in range(first, len(segments)):
        for k in range(len(segments)):
            seen = k <= q and segments[k] in (segments[q], TRUNK)
            assert visible[0, q - first, k] == (q - k + 1 if seen else 0)


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_against_pytorch(groups: int, window: int) -> None:
    """Rows of two segments with padding, groups of 6, 3 and 1 queries a key."""
    q, k, v = random(2, 10, 6, 8, seed=1), random(2, 10, groups, 8, seed=2), random(2, 10, groups, 8, seed=3)
    segments = np.array([[1] * 6 + [2] * 4, [1] * 3 + [2] * 5 + [0] * 2], np.int32)
    places = jnp.arange(10)[None]
    visible = visibility(jnp.asarray(segments), jnp.asarray(segments), places, places)
    ours = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), visible, window)

    distance = np.arange(10)[:, None] - np.arange(10)[None]
    mask = (segments[:, :, None] == segments[:, None, :]) & (distance >= 0)
    mask &= (distance < window) | (window == 0)
    heads_first = [torch.tensor(x.swapaxes(1, 2)) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=torch.tensor(mask)[:, None], enable_gqa=True
    )
    np.testing.assert_allclose(ours, theirs.numpy().swapaxes(1, 2), atol=2e-6)


def test_gradients_against_pytorch() -> None:
    q, k, v = random(1, 6, 4, 8, seed=1), random(1, 6, 2, 8, seed=2), random(1, 6, 2, 8, seed=3)
    out = random(1, 6, 4, 8, seed=4)
    ones, places = jnp.ones((1, 6), jnp.int32), jnp.arange(6)[None]
    visible = visibility(ones, ones, places, places)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, visible, 3) * out)

    inputs = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    distance = np.arange(6)[:, None] - np.arange(6)[None]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.swapaxes(1, 2) for x in inputs), attn_mask=torch.tensor((distance >= 0) & (distance < 3)), enable_gqa=True
    )
    (theirs.swapaxes(1, 2) * torch.tensor(out)).sum().backward()
    for gradient, reference in zip(jax.grad(ours, (0, 1, 2))(q, k, v), inputs, strict=True):
        np.testing.assert_allclose(gradient, reference.grad, atol=5e-6)


def test_bfloat16_scores_are_summed_in_float32() -> None:
    """256 keys whose scores differ by less than bfloat16 resolves still get different weights."""
    keys = 256
    q = jnp.full((1, 1, 1, 64), 4.0, jnp.bfloat16)
    k = np.full((1, keys, 1, 64), 4.0, np.float32)
    k[0, ::2, 0, 0] += 0.25  # 0.125 more on a score of 128, where bfloat16 steps by 1
    v = np.zeros((1, keys, 1, 64), np.float32)
    v[0, ::2] = 1.0
    visible = jnp.ones((1, 1, keys), jnp.int32)
    out = attention(q, jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16), visible, 0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + np.exp(-0.125)), rtol=5e-3)


def test_padding_is_finite() -> None:
    """A row without a single segment, and a query that only sees itself: no NaN forward or backward."""
    q = jnp.asarray(random(1, 4, 2, 8, seed=1))
    segments, places = jnp.zeros((1, 4), jnp.int32), jnp.arange(4)[None]
    nothing = jnp.zeros((1, 4, 4), jnp.int32)
    for visible in (visibility(segments, segments, places, places), nothing):
        value, grad = jax.value_and_grad(lambda q, visible=visible: jnp.sum(attention(q, q, q, visible, 0)))(q)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()
