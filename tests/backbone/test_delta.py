"""The gated delta rule in chunks against the rule position by position, over borders of chunks and segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2p_jax.backbone.delta import CHUNK, _convolve, gated_delta, place_in_run, segment_runs

ROWS, LENGTH, GROUPS, REPEATS, KEYS, VALUES = 2, 2 * CHUNK + 22, 2, 2, 4, 3
# A border inside a chunk, one between two, one beside another; padding in front and behind.
SEGMENTS = np.array(
    [
        np.repeat([1, 2, 3, 0], [40, CHUNK - 40, 80, LENGTH - CHUNK - 80]),
        np.repeat([0, 1, 2, 1], [3, 1, 70, LENGTH - 74]),
    ]
)


def inputs() -> list[jax.Array]:
    rng = np.random.default_rng(0)
    heads = (ROWS, LENGTH, GROUPS)
    q, k = (rng.normal(size=(*heads, KEYS)) for _ in range(2))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    written, decay = rng.uniform(0, 1, (*heads, REPEATS)), -(rng.uniform(0, 0.5, (*heads, REPEATS)) ** 2)
    state = rng.normal(size=(ROWS, GROUPS, REPEATS, KEYS, VALUES))
    values = rng.normal(size=(*heads, REPEATS, VALUES))
    return [jnp.asarray(array, jnp.float32) for array in (q, k, values, written, decay, state)]


def one_by_one(
    q: jax.Array, k: jax.Array, v: jax.Array, written: jax.Array, decay: jax.Array, start: jax.Array, runs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def step(carry: tuple[jax.Array, jax.Array], at: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        (state, before), (q, k, v, written, decay, run) = carry, at
        state = jnp.where((run == before)[:, None, None, None, None], state, start) * jnp.exp(decay)[..., None, None]
        known = jnp.einsum("bgk,bgrkv->bgrv", k, state)
        state = state + jnp.einsum("bgk,bgrv->bgrkv", k, (v - known) * written[..., None])
        return (state, run), jnp.einsum("bgk,bgrkv->bgrv", q, state)

    first = jnp.zeros(ROWS, jnp.int32)
    by_position = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, written, decay, runs)]
    (state, _), said = jax.lax.scan(step, (start, first), tuple(by_position))
    return jnp.moveaxis(said, 0, 1), state


@pytest.mark.parametrize("empty", [True, False], ids=["anew", "going on"])
def test_chunks_say_what_the_rule_says(empty: bool) -> None:
    """Values, the state that is left, and the gradients of both; every run begins with the state that is given."""
    runs = segment_runs(jnp.asarray(SEGMENTS, jnp.int32))
    rng = np.random.default_rng(1)
    weights = [
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, LENGTH, 2, 2, VALUES), (2, 2, 2, KEYS, VALUES))
    ]

    def total(said: tuple[jax.Array, ...]) -> jax.Array:
        return sum((jnp.sum(a * b) for a, b in zip(said, weights, strict=True)), start=jnp.zeros(()))

    def chunks(*x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gated_delta(*x[:5], runs, None if empty else x[5])

    def plainly(*x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return one_by_one(*x[:5], jnp.zeros_like(x[5]) if empty else x[5], runs)

    which = tuple(range(5 if empty else 6))
    ours = jax.jit(lambda *x: (chunks(*x), jax.grad(lambda *x: total(chunks(*x)), which)(*x)))(*inputs())
    plain = jax.jit(lambda *x: (plainly(*x), jax.grad(lambda *x: total(plainly(*x)), which)(*x)))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain(*inputs())), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_what_is_kept_is_gone_on_from() -> None:
    """A row of one segment, padding in front, read in three parts, of which one is a single position."""
    *x, state = inputs()
    rule, convolve = jax.jit(gated_delta), jax.jit(_convolve)
    segments = jnp.asarray(np.arange(LENGTH)[None] >= np.array([[0], [7]]), jnp.int32)
    taps = jnp.asarray(np.random.default_rng(2).normal(size=(KEYS, 1, 4)), jnp.float32)
    none = jnp.zeros((ROWS, 3, KEYS))
    runs = segment_runs(segments)
    whole = [*rule(*x, runs, state), *convolve(x[0][:, :, 0], taps, place_in_run(runs), none)]
    last, said, seen = none, [], []
    for start, end in [(0, 90), (90, 91), (91, LENGTH)]:
        part = segment_runs(segments[:, start:end])
        now, state = rule(*(array[:, start:end] for array in x), part, state)
        convolved, last = convolve(x[0][:, start:end, 0], taps, place_in_run(part), last)
        said, seen = [*said, now], [*seen, convolved]
    parts = [jnp.concatenate(said, axis=1), state, jnp.concatenate(seen, axis=1), last]
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_convolution_sees_its_own_segment_and_what_was_before_all() -> None:
    x = jnp.arange(1.0, 8.0)[None, :, None]
    places = place_in_run(segment_runs(jnp.asarray([[1, 1, 1, 2, 2, 0, 0]], jnp.int32)))
    taps = jnp.asarray([[[100.0, 10.0, 1.0]]])
    assert _convolve(x, taps, places, None)[0][0, :, 0].tolist() == [1, 12, 123, 4, 45, 6, 67]
    seen, last = _convolve(x, taps, places, jnp.asarray([[[8.0], [9.0]]]))
    assert seen[0, :, 0].tolist() == [891, 912, 123, 894, 945, 896, 967]
    assert last[0, :, 0].tolist() == [6, 7]
    assert _convolve(x[:, :1], taps, places[:, :1], last)[1][0, :, 0].tolist() == [7, 1]
