"""Cross-entropy over a large vocabulary in which only some of the logits exist at a time, each worked out once.

Of a frozen head nothing but the gradient of the hidden states is wanted, and that is at hand with the value: softmax
less one-hot, times the head. So both come out of one pass over the targets in chunks, as in Cut Cross-Entropy (Wijmans
et al., arXiv 2411.09009), and the backward pass only weighs what is there. Where a teacher has a say, some tokens more
have a share of what is one-hot otherwise.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from e2p_jax.backbone.blocks import soft_cap
from e2p_jax.parallel.mesh import row_shards, shard_vocabulary, vocabulary_shards
from e2p_jax.products import einsum

_Head = tuple[jax.Array, jax.Array | None]  # [V, D], and [V] float32 that is added to its logits
_Pair = tuple[jax.Array, jax.Array]


class Taught(NamedTuple):
    """What a teacher makes of targets: tokens with shares of the loss. The true token has what is left of 1."""

    ids: jax.Array  # [B, M, k] int32
    shares: jax.Array  # [B, M, k] float32, of a sum up to 1; 0 throughout where there is no teacher


class _Targets(NamedTuple):
    ids: jax.Array  # [B, M] int32
    taught: Taught | None


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
    return taught_cross_entropy(hidden, head, ids, None, cap, bias, at_once=at_once)[0]


def taught_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    ids: jax.Array,
    taught: Taught | None,
    cap: float = 0.0,
    bias: jax.Array | None = None,
    *,
    at_once: int,
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy with the true tokens' and the teacher's shares, and `cross_entropy`, which has no gradient.

    Without a teacher both are the same.
    """
    targets = _Targets(ids, taught)
    loss, nll = _cross_entropy(hidden, (shard_vocabulary(head), bias), targets, cap, at_once)
    return loss, jax.lax.stop_gradient(nll)


def top_tokens(
    hidden: jax.Array, head: jax.Array, count: int, temperature: float, cap: float, bias: jax.Array | None, at_once: int
) -> tuple[jax.Array, jax.Array]:
    """The likeliest next tokens.

    Args:
      hidden: [B, M, D].
      count: k, how many.
      temperature: that logits are divided by.

    Returns:
      [B, M, k] int32, the likeliest first, and the logarithms of their probabilities, [B, M, k] float32.
    """

    def top(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(hidden, (head, bias), cap) / temperature
        highest, ids = jax.lax.top_k(logits, count)
        return ids, highest - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    head = shard_vocabulary(head)
    return _in_chunks(top, (hidden,), head.shape[0], at_once)


def _values(hidden: jax.Array, head: _Head, targets: _Targets, cap: float, at_once: int) -> _Pair:
    return _in_chunks(functools.partial(_losses, head=head, cap=cap), (hidden, targets), head[0].shape[0], at_once)


def _forward(hidden: Any, head: Any, targets: Any, cap: float, at_once: int) -> tuple[_Pair, Any]:
    """Values, and a function from the cotangents of the losses to those of hidden states and head."""
    parts = [part for part in head if part is not None]
    values = tuple(part and part.value for part in head)
    targets = jax.tree.map(lambda part: part.value, targets)
    if any(part.perturbed for part in parts):  # it is trained: its gradient needs the cotangents, chunks are done again

        def both(hidden: jax.Array, head: _Head) -> _Pair:
            return _values(hidden, head, targets, cap, at_once)

        loss, pull, nll = jax.vjp(both, hidden.value, values, has_aux=True)
        return (loss, nll), pull
    chunk = functools.partial(_losses_and_slope, head=values, cap=cap)
    losses, slope = _in_chunks(chunk, (hidden.value, targets), values[0].shape[0], at_once)
    return losses, jax.tree_util.Partial(_weigh, slope)


def _weigh(slope: jax.Array, loss_grad: jax.Array) -> tuple[jax.Array, None]:
    return (slope.astype(jnp.float32) * loss_grad[..., None]).astype(slope.dtype), None


def _backward(cap: float, at_once: int, pull: Callable[[jax.Array], tuple], grads: tuple[jax.Array, Any]) -> tuple:
    return *pull(grads[0]), None


_cross_entropy = jax.custom_vjp(_values, nondiff_argnums=(3, 4))
_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(hidden: jax.Array, head: _Head, cap: float) -> jax.Array:
    matrix, bias = head
    logits = einsum("bmd,vd->bmv", hidden, matrix, out=jnp.float32)
    return soft_cap(logits if bias is None else logits + bias[None, None], cap)


def _losses(hidden: jax.Array, targets: _Targets, *, head: _Head, cap: float) -> _Pair:
    logits = _logits(hidden, head, cap)
    return _of_logits(logits, jax.nn.logsumexp(logits, axis=-1), targets)


def _of_logits(logits: jax.Array, log_total: jax.Array, targets: _Targets) -> _Pair:
    """[B, M] nats of all shares, and [B, M] of the true tokens."""
    ids, taught = targets
    nll = log_total - jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    if taught is None:
        return nll, nll
    others = log_total[..., None] - jnp.take_along_axis(logits, taught.ids, axis=-1)
    return nll * _left(taught) + jnp.sum(taught.shares * others, axis=-1), nll


def _left(taught: Taught) -> jax.Array:
    return 1 - jnp.sum(taught.shares, axis=-1)


def _losses_and_slope(hidden: jax.Array, targets: _Targets, *, head: _Head, cap: float) -> tuple[_Pair, jax.Array]:
    """[B, M] nats as `_of_logits` has them, and the gradients of the former by the hidden states, [B, M, D]."""
    logits = _logits(hidden, head, cap)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    losses = _of_logits(logits, log_total, targets)
    matrix, (ids, taught) = head[0], targets
    is_chosen = ids[..., None] == jnp.arange(matrix.shape[0], dtype=ids.dtype)[None, None]
    share = is_chosen.astype(jnp.float32)
    if taught is not None:
        share = jax.vmap(jax.vmap(lambda row, ids, shares: row.at[ids].add(shares)))(
            share * _left(taught)[..., None], *taught
        )
    slope = jnp.exp(logits - log_total[..., None]) - share
    if cap:
        slope = slope * (1 - jnp.square(logits / cap))
    slope = einsum("bmv,vd->bmd", slope.astype(matrix.dtype), matrix, out=jnp.float32)
    return losses, slope.astype(hidden.dtype)


def _in_chunks(function: Callable[..., Any], inputs: Any, vocabulary: int, at_once: int) -> Any:
    """`function` of arrays [B, M, ...], a part of the M targets at a time; gives such arrays."""
    batch, count = jax.tree.leaves(inputs)[0].shape[:2]
    logits_a_target = -(-batch // row_shards()) * (vocabulary // vocabulary_shards(vocabulary))
    chunks = -(-count // max(1, at_once // logits_a_target))
    if chunks == 1:
        return function(*inputs)
    size = -(-count // chunks)

    def split(x: jax.Array) -> jax.Array:  # the last chunk ends in targets that nobody asked for
        x = jnp.pad(x, [(0, 0), (0, chunks * size - count)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, chunks, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, chunks * size, *x.shape[3:])[:, :count]

    out = jax.lax.map(lambda chunk: jax.checkpoint(function)(*chunk), jax.tree.map(split, inputs))
    return jax.tree.map(join, out)
