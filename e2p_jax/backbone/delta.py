"""Linear attention by the gated delta rule (Yang et al., arXiv 2412.06464), of layers that keep a state of fixed size.

A head's state is a matrix S [K, V] from keys to values. At each position it decays, forgets part of what it says of the
key and takes part of the value in its place; what it then says of the query is the head's output:
S = exp(g) S;  S = S + k (b (v - k S));  o = q S.

A row is read in chunks, and in each all positions at once (section 3.3): the values that a chunk writes are the
solution of a triangular system. One position is a chunk of its own: decoding is the rule as it stands above.
Axis letters beside the decoder's: N chunks of W positions; G heads of keys, each of R heads of values, K and V wide.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.backbone.mlp import ACTIVATIONS, linear
from e2p_jax.backbone.norm import norm
from e2p_jax.products import einsum

CHUNK = 64  # W: twice as many double what a chunk costs by itself and halve the steps from chunk to chunk
_TINY = 1e-6  # of squared lengths

Kept = Mapping[str, jax.Array]  # of `layout.cache_shapes`, [B, ...]


def delta_attention(
    h: jax.Array, params: dict[str, Any], config: DecoderConfig, runs: jax.Array, kept: Kept | None
) -> tuple[jax.Array, Kept]:
    """A layer's linear attention, up to the residual.

    Args:
      h: [B, T, D].
      params: of the layer.
      runs: [B, T] int32 from `segment_runs`: a state is of one run, and so is what a convolution sees.
      kept: of the positions before, which every run goes on from; None where there are none.

    Returns:
      [B, T, D], and what is kept of the last position's run.
    """
    c, (batch, length, _) = config, h.shape
    seen, new = {}, {}
    inside = place_in_run(runs)
    for name in "qkv":
        x, last = linear(h, params, f"linear_{name}"), None if kept is None else kept[f"linear_{name}_last"]
        seen[name], new[f"linear_{name}_last"] = _convolve(x, params[f"linear_{name}_taps"], inside, last)
    q, k, v = (ACTIVATIONS[c.activation](seen[name]).astype(h.dtype).astype(jnp.float32) for name in "qkv")
    groups, repeats = c.linear_key_heads, c.linear_value_heads // c.linear_key_heads
    q, k = (x.reshape(batch, length, groups, c.linear_key_dim) for x in (q, k))
    v = v.reshape(batch, length, groups, repeats, c.linear_value_dim)

    def by_head(name: str) -> jax.Array:
        return linear(h, params, name).astype(jnp.float32).reshape(batch, length, groups, repeats)

    def of_heads(name: str) -> jax.Array:
        return params[name].astype(jnp.float32).reshape(1, 1, groups, repeats)

    written = jax.nn.sigmoid(by_head("linear_write"))
    decay = -jnp.exp(of_heads("linear_log_rate")) * jax.nn.softplus(
        by_head("linear_decay") + of_heads("linear_step_bias")
    )
    state = None if kept is None else kept["linear_state"]
    said, new["linear_state"] = gated_delta(_unit(q) * c.linear_key_dim**-0.5, _unit(k), v, written, decay, runs, state)
    said = said.astype(h.dtype).reshape(batch, length, c.linear_value_heads, c.linear_value_dim)
    said = norm(said, params, "linear_out_norm", dataclasses.replace(c, norm="rms"))
    gate = linear(h, params, "linear_gate").reshape(said.shape).astype(jnp.float32)
    said = (said.astype(jnp.float32) * jax.nn.silu(gate)).astype(h.dtype)
    return linear(said.reshape(batch, length, -1), params, "linear_o"), new


def segment_runs(segment_ids: jax.Array) -> jax.Array:
    """Counts segments in each row from 0, [B, T] int32."""
    return jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1, dtype=jnp.int32)


def place_in_run(runs: jax.Array) -> jax.Array:
    """[B, T] int32: how many positions of its run stand before each."""
    index = jnp.arange(runs.shape[1], dtype=jnp.int32)[None]
    begins = jnp.diff(runs, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def _convolve(x: jax.Array, taps: jax.Array, inside: jax.Array, last: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Each channel's sum over its own last positions within the run and, beyond its beginning, over those of `last`,
    [B, T, C] float32; and the last of these, as `last` is.

    Args:
      x: [B, T, C].
      taps: [C, 1, taps], the own position's last.
      inside: [B, T] of `place_in_run`.
      last: [B, taps - 1, C], or None for zeros.
    """
    back = taps.shape[-1] - 1
    seen = []  # what stands so many places before each position, farthest first
    for far in range(back, -1, -1):
        before = jnp.zeros((), x.dtype)
        if last is not None and far:
            before = jnp.take_along_axis(last.astype(x.dtype), jnp.clip(inside + back - far, 0, back - 1)[..., None], 1)
        shifted = jnp.pad(x, ((0, 0), (far, 0), (0, 0)))[:, : x.shape[1]]
        seen.append(jnp.where((inside >= far)[..., None], shifted, before))
    weights = taps[None, :, 0].astype(jnp.float32)[None]
    total = sum((each.astype(jnp.float32) * weights[..., tap] for tap, each in enumerate(seen)), jnp.zeros(()))
    return total, jnp.stack([each[:, -1] for each in seen[1:]], axis=1)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _TINY)


def gated_delta(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    written: jax.Array,
    decay: jax.Array,
    runs: jax.Array,
    start: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The rule of the head of this module; all in float32.

    Args:
      q: [B, T, G, K].
      k: [B, T, G, K].
      v: [B, T, G, R, V].
      written: [B, T, G, R], b: between 0 and 1.
      decay: [B, T, G, R], g: at most 0.
      runs: [B, T] int32, ascending from 0; each begins with the state `start`.
      start: [B, G, R, K, V], or None for an empty one.

    Returns:
      [B, T, G, R, V], and the state after the last position.
    """
    batch, length = runs.shape
    width = min(CHUNK, length)
    spare = -length % width  # positions that neither write nor decay

    def chunks(x: jax.Array, **how: Any) -> jax.Array:
        """[B, T, ...] -> [N, B, ..., W] or, of vectors [B, T, G, ..., C], [N, B, G, ..., W, C]."""
        x = jnp.pad(x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2)), **how)
        return jnp.moveaxis(x.reshape(batch, -1, width, *x.shape[2:]), 1, 0)

    runs = chunks(runs, mode="edge")  # [N, B, W]
    before = jnp.concatenate([jnp.zeros((1, batch), jnp.int32), runs[:-1, :, -1]])  # [N, B]
    goes_on, lasts = (runs == before[..., None])[:, :, None, None], (runs == runs[..., -1:])[:, :, None, None]
    q, k = (jnp.moveaxis(chunks(x), 2, 3) for x in (q, k))  # [N, B, G, W, K]
    v = jnp.moveaxis(chunks(v), 2, 4)  # [N, B, G, R, W, V]
    written, decay = (jnp.moveaxis(chunks(x), 2, 4) for x in (written, decay))  # [N, B, G, R, W]
    total = jnp.cumsum(decay, axis=-1)
    begins = (jnp.diff(runs, axis=-1, prepend=before[..., None]) != 0)[:, :, None, None]
    # Sums only fall: that before the last run's first position is the least.
    left = jnp.exp(total - jax.lax.cummin(jnp.where(begins, total - decay, 0.0), axis=total.ndim - 1))
    kept = jnp.where(goes_on, left, 0.0)  # of the state before the chunk
    to_end = jnp.where(lasts, jnp.exp(total[..., -1:] - total), 0.0)  # of what is written in it

    place = jnp.arange(width)
    same = (runs[..., :, None] == runs[..., None, :]) & (place[:, None] >= place[None])[None, None]
    pair = jnp.where(same[:, :, None, None], total[..., :, None] - total[..., None, :], -jnp.inf)
    pair = jnp.exp(pair)  # [N, B, G, R, W, W]: what is left at a position of what was written at one before

    def alike(x: jax.Array) -> jax.Array:
        return einsum("nbgic,nbgjc->nbgij", x, k)[:, :, :, None] * pair

    strict = jnp.where(place[:, None] > place[None], 1.0, 0.0)[None, None, None, None]
    solved = _inverse(alike(k) * written[..., None] * strict)
    values = einsum("nbgrij,nbgrjv->nbgriv", solved, v * written[..., None])

    def of_state(left: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the chunk's values and outputs read of a state of which so much is left, [N, B, G, R, W, K] each."""
        reads = einsum("nbgrij,nbgrjk->nbgrik", solved, k[:, :, :, None] * (written * left)[..., None])
        return reads, q[:, :, :, None] * left[..., None]

    (reads, asks), seen = of_state(kept), alike(q)
    keys = k[:, :, :, None] * to_end[..., None]
    own = jnp.zeros((*v.shape[1:4], k.shape[-1], v.shape[-1])) if start is None else start
    fresh = None  # what runs that begin in the chunk have of `start`
    if start is not None and length > 1:
        share = jnp.where(goes_on, 0.0, left)
        fresh_reads, fresh_asks = of_state(share)
        values -= einsum("nbgrik,bgrkv->nbgriv", fresh_reads, start)
        fresh = einsum("nbgrik,bgrkv->nbgriv", fresh_asks, start), share[..., -1]

    def step(state: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
        values, reads, asks, seen, keys, left, fresh = chunk
        new = values - einsum("bgrik,bgrkv->bgriv", reads, state)
        said = einsum("bgrik,bgrkv->bgriv", asks, state) + einsum("bgrij,bgrjv->bgriv", seen, new)
        state = state * left[..., None, None] + einsum("bgrik,bgriv->bgrkv", keys, new)
        if fresh is not None:
            said, state = said + fresh[0], state + own * fresh[1][..., None, None]
        return state, said

    state, said = jax.lax.scan(step, own, (values, reads, asks, seen, keys, kept[..., -1], fresh))
    said = jnp.moveaxis(said, (0, 4), (1, 2)).reshape(batch, length + spare, *said.shape[2:4], said.shape[-1])
    return said[:, :length], state


@jax.custom_vjp
def _inverse(below: jax.Array) -> jax.Array:
    """The inverse of 1 + L, given L [..., W, W] with nothing on its diagonal or above.

    Blocks on the diagonal are joined two by two: [[A, 0], [C, B]] has the inverse [[a, 0], [-b C a, b]]. That is
    matrix products alone, where solving row by row is W steps.
    """
    width = below.shape[-1]
    place = jnp.arange(width)
    found = jnp.broadcast_to(jnp.eye(width, dtype=below.dtype), below.shape)
    size = 1
    while size < width:
        block = place // size
        left = (block[:, None] % 2 == 1) & (block[None] == block[:, None] - 1)
        corner = jnp.where(jnp.expand_dims(left, tuple(range(below.ndim - 2))), below, 0.0)
        found -= einsum("...ij,...jk->...ik", einsum("...ij,...jk->...ik", found, corner), found)
        size *= 2
    return found


def _inverse_forward(below: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = _inverse(below)
    return found, found


def _inverse_backward(found: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    turned = found.swapaxes(-1, -2)
    return (-einsum("...ij,...jk->...ik", einsum("...ij,...jk->...ik", turned, gradient), turned),)


_inverse.defvjp(_inverse_forward, _inverse_backward)
