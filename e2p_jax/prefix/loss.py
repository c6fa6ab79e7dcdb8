"""Cross-entropy over a large vocabulary in which only some of the logits exist at a time, each worked out once.

Of a frozen head nothing but the gradient of the hidden states is wanted, and that is at hand with the value: softmax
less one-hot, times the head. So both come out of one pass over the targets in chunks, as in Cut Cross-Entropy (Wijmans
et al., arXiv 2411.09009), and the backward pass only weighs what is there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from e2p_jax.backbone.blocks import soft_cap
from e2p_jax.parallel.mesh import row_shards, shard_vocabulary, vocabulary_shards
from e2p_jax.products import einsum

_Head = tuple[jax.Array, jax.Array | None]  # [V, D], and [V] float32 that is added to its logits


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    ids: jax.Array,
    cap: float = 0.0,
    bias: jax.Array | None = None,
    *,
    at_once: int,
) -> jax.Array:
    """-log softmax(soft_cap(hidden @ head.T + bias))[ids], the targets gone through in chunks.

    Args:
      hidden: [B, M, D].
      head: [V, D].
      ids: [B, M] int32.
      cap: soft cap of the logits, 0 for none.
      bias: [V] float32, or none.
      at_once: about so many logits, float32, each device holds at most.

    Returns:
      [B, M] float32, nats.
    """
    return _cross_entropy(hidden, (shard_vocabulary(head), bias), ids, cap, at_once)


def _values(hidden: jax.Array, head: _Head, ids: jax.Array, cap: float, at_once: int) -> jax.Array:
    return _in_chunks(functools.partial(_nll, head=head, cap=cap), hidden, ids, head[0].shape[0], at_once)


def _forward(hidden: Any, head: Any, ids: Any, cap: float, at_once: int) -> tuple[jax.Array, Any]:
    """Values, and a function from their cotangents to those of hidden states and head."""
    parts = [part for part in head if part is not None]
    values = tuple(part and part.value for part in head)
    if any(part.perturbed for part in parts):  # it is trained: its gradient needs the cotangents, chunks are done again
        return jax.vjp(lambda hidden, head: _values(hidden, head, ids.value, cap, at_once), hidden.value, values)
    chunk = functools.partial(_nll_and_slope, head=values, cap=cap)
    nll, slope = _in_chunks(chunk, hidden.value, ids.value, values[0].shape[0], at_once)
    return nll, jax.tree_util.Partial(_weigh, slope)


def _weigh(slope: jax.Array, nll_grad: jax.Array) -> tuple[jax.Array, None]:
    return (slope.astype(jnp.float32) * nll_grad[..., None]).astype(slope.dtype), None


def _backward(cap: float, at_once: int, pull: Callable[[jax.Array], tuple], nll_grad: jax.Array) -> tuple:
    return *pull(nll_grad), None


_cross_entropy = jax.custom_vjp(_values, nondiff_argnums=(3, 4))
_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(hidden: jax.Array, head: _Head, cap: float) -> jax.Array:
    matrix, bias = head
    logits = einsum("bmd,vd->bmv", hidden, matrix, out=jnp.float32)
    return soft_cap(logits if bias is None else logits + bias[None, None], cap)


def _nll(hidden: jax.Array, ids: jax.Array, *, head: _Head, cap: float) -> jax.Array:
    logits = _logits(hidden, head, cap)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]


def _nll_and_slope(hidden: jax.Array, ids: jax.Array, *, head: _Head, cap: float) -> tuple[jax.Array, jax.Array]:
    """[B, M] nats, and their gradients by the hidden states, [B, M, D]."""
    logits = _logits(hidden, head, cap)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    matrix = head[0]
    is_chosen = ids[..., None] == jnp.arange(matrix.shape[0], dtype=ids.dtype)[None, None]
    slope = jnp.exp(logits - log_total[..., None]) - is_chosen.astype(jnp.float32)
    if cap:
        slope = slope * (1 - jnp.square(logits / cap))
    slope = einsum("bmv,vd->bmd", slope.astype(matrix.dtype), matrix, out=jnp.float32)
    return log_total - chosen, slope.astype(hidden.dtype)


def _in_chunks(function: Callable[..., Any], hidden: jax.Array, ids: jax.Array, vocabulary: int, at_once: int) -> Any:
    """`function` of hidden states [B, M, D] and ids [B, M], a part of the M targets at a time; gives [B, M, ...]."""
    batch, count = ids.shape
    logits_a_target = -(-batch // row_shards()) * (vocabulary // vocabulary_shards(vocabulary))
    chunks = -(-count // max(1, at_once // logits_a_target))
    if chunks == 1:
        return function(hidden, ids)
    size = -(-count // chunks)

    def split(x: jax.Array) -> jax.Array:  # the last chunk ends in targets that nobody asked for
        x = jnp.pad(x, [(0, 0), (0, chunks * size - count)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunks, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, chunks * size, *x.shape[3:])[:, :count]

    out = jax.lax.map(lambda chunk: jax.checkpoint(function)(*chunk), (split(hidden), split(ids)))
    return jax.tree.map(join, out)
