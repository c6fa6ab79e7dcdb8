"""Attention of packed rows block by block: no [B, T, T] array, and blocks in which nobody sees anybody are skipped.

FlashAttention's recurrence (Dao et al., arXiv 2205.14135) in plain XLA, for CPUs and wherever there is no kernel. A
packed row's examples are short, so that most blocks below the diagonal are empty too. Axis letters beside the
decoder's: N blocks of W positions in a row; R queries a key, so that G x R are the heads H.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from e2p_jax.products import einsum

BLOCK = 128  # W; a row of another length than a multiple of it is one block
SAVED = "attention"  # the name under which a checkpoint policy finds what the backward pass needs of the forward
HIDDEN = -1e30  # in place of a hidden score: finite, so that no NaN comes out of a block without a visible one


class _Mask(NamedTuple):
    """The blocks of keys that a block of queries sees."""

    segments: jax.Array  # [N, B, W] int32
    window: jax.Array  # [] int32, 0 is unlimited
    first: jax.Array  # [N] int32: the first block of keys that a block of queries sees

    def scores(self, q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array, cap: float) -> tuple[jax.Array, jax.Array]:
        """[B, G, R*W, W] float32 of the queries of block i and the keys of block j: hidden ones low, and as capped."""
        batch, groups, queries, _ = q.shape
        width = k.shape[2]
        scores = einsum("bgqc,bgkc->bgqk", q, k, out=jnp.float32)
        scores = soft_cap(scores, cap)
        place = jnp.arange(width)
        distance = ((i - j) * width + place[:, None] - place[None])[None]
        visible = (self.segments[i][:, :, None] == self.segments[j][:, None, :]) & (distance >= 0)
        visible &= (distance < self.window) | (self.window == 0)
        # Added, not selected: XLA on CPU fuses a select into both reductions and runs 2x slower.
        bias = jnp.where(visible, 0.0, HIDDEN)[:, None, None]
        hidden = scores.reshape(batch, groups, queries // width, width, width) + bias
        return hidden.reshape(scores.shape), scores


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Returns cap * tanh(x / cap), Gemma 2's bound on scores and logits (arXiv 2408.00118, section 2); x at cap 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def first_blocks(segments: jax.Array, window: jax.Array, width: int) -> jax.Array:
    """[B, T] int32 -> [N] int32: for each block of queries, the first block of keys that any row sees something of.

    Segments in the order of their numbers, padding last, are told apart exactly; in another order too little is
    skipped, never too much.
    """
    batch, length = segments.shape
    count = length // width
    order = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments).reshape(batch, count, width)
    least, most = order.min(axis=-1), order.max(axis=-1)
    share = (least[:, :, None] <= most[:, None, :]) & (least[:, None, :] <= most[:, :, None])
    back = jnp.arange(count)[:, None] - jnp.arange(count)[None]
    near = ((back - 1) * width + 1 < window) | (window == 0)
    return jnp.argmax(share.any(axis=0) & (back >= 0) & near, axis=1).astype(jnp.int32)


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: jax.Array | int,
    sinks: jax.Array | None = None,
    *,
    scale: float,
    cap: float = 0.0,
) -> jax.Array:
    """Gives what `attention.attention` gives, for rows that look at themselves.

    Args:
      q: [B, T, H, C].
      k: [B, T, G, C].
      v: [B, T, G, C].
      segment_ids: [B, T] int32.
      window: scalar; a query sees at most this many positions, itself included; 0 is unlimited.
      sinks: [H], as `attention.attention` takes them, or None.
      scale: of the scores.
      cap: soft cap of the scores, 0 for none.

    Returns:
      [B, T, H, C] in q's dtype. Scores, sums and gradients are float32.
    """
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    width = BLOCK if length % BLOCK == 0 else length
    count = length // width
    window = jnp.asarray(window, jnp.int32)
    # Heads before positions, and a group's queries in one matrix: plain batched matmuls, 3x faster on CPU.
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, count, width, groups, heads // groups, size)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(count, batch, groups, -1, size)
    k, v = (x.reshape(batch, count, width, groups, size).transpose(1, 0, 3, 2, 4) for x in (k, v))
    segments = segment_ids.reshape(batch, count, width).swapaxes(0, 1)
    mask = _Mask(segments, window, first_blocks(segment_ids, window, width))
    if sinks is not None:
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(groups, -1), width, axis=1)
    out = _attend(q, k, v, sinks, mask, cap).reshape(count, batch, groups, heads // groups, width, size)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, length, heads, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, mask: _Mask, cap: float) -> jax.Array:
    """Q [N, B, G, R*W, C], k, v [N, B, G, W, C] and sinks [G, R*W] float32 -> [N, B, G, R*W, C]."""
    return _forward(q, k, v, sinks, mask, cap)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, mask: _Mask, cap: float
) -> tuple[jax.Array, tuple]:
    def queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def keys(j: jax.Array, state: tuple) -> tuple:
            most, total, mixed = state
            scores, _ = mask.scores(q[i], k[j], i, j, cap)
            new = jnp.maximum(most, scores.max(axis=-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
            part = einsum("bgqk,bgkc->bgqc", weights.astype(v.dtype), v[j], out=jnp.float32)
            return new, total * shrink + weights.sum(axis=-1), mixed * shrink[..., None] + part

        rows = q.shape[1:4]
        start = jnp.full(rows, HIDDEN), jnp.zeros(rows), jnp.zeros(q.shape[1:])
        if sinks is not None:  # a key that was seen first, whose value is zero
            start = jnp.broadcast_to(sinks[None], rows), jnp.ones(rows), start[2]
        most, total, mixed = jax.lax.fori_loop(mask.first[i], i + 1, keys, start)
        return (mixed / total[..., None]).astype(q.dtype), most + jnp.log(total)

    out, log_total = (checkpoint_name(x, SAVED) for x in jax.lax.map(queries, jnp.arange(q.shape[0])))
    return out, (q, k, v, sinks, mask, out, log_total)


def _backward(cap: float, saved: tuple, out_grad: jax.Array) -> tuple:
    q, k, v, sinks, mask, out, log_total = saved

    def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return einsum(equation, a, b, out=jnp.float32)

    def queries(key_grads: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        grad = out_grad[i]
        shared = jnp.sum(grad.astype(jnp.float32) * out[i].astype(jnp.float32), axis=-1, keepdims=True)

        def keys(j: jax.Array, grads: tuple) -> tuple:
            q_grad, k_grad, v_grad = grads
            scores, capped = mask.scores(q[i], k[j], i, j, cap)
            weights = jnp.exp(scores - log_total[i][..., None])
            scores_grad = weights * (product("bgqc,bgkc->bgqk", grad, v[j]) - shared)
            if cap:
                scores_grad = scores_grad * (1 - jnp.square(capped / cap))
            scores_grad, weights = scores_grad.astype(q.dtype), weights.astype(v.dtype)
            return (
                q_grad + product("bgqk,bgkc->bgqc", scores_grad, k[j]),
                k_grad.at[j].add(product("bgqk,bgqc->bgkc", scores_grad, q[i])),
                v_grad.at[j].add(product("bgqk,bgqc->bgkc", weights, grad)),
            )

        q_grad, *key_grads = jax.lax.fori_loop(mask.first[i], i + 1, keys, (jnp.zeros(q.shape[1:]), *key_grads))
        return tuple(key_grads), q_grad.astype(q.dtype)

    start = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (k_grad, v_grad), q_grad = jax.lax.scan(queries, start, jnp.arange(q.shape[0]))
    sinks_grad = None
    if sinks is not None:
        shared = jnp.sum(out_grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        sinks_grad = -jnp.sum(jnp.exp(sinks[None, None] - log_total) * shared, axis=(0, 1))
    return q_grad, k_grad.astype(k.dtype), v_grad.astype(v.dtype), sinks_grad, None


_attend.defvjp(_forward, _backward)
