"""Masked attention over packed rows."""

import functools
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from e2p_jax.backbone.blocks import block_attention, soft_cap
from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import on_each_device

Kind = Literal["xla", "splash", "cudnn"]
Choice = Literal["auto", "xla", "splash", "cudnn"]
_PLATFORMS = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}


def runs_on(kind: Choice, platform: str) -> bool:
    """Tells whether devices of a platform can do what `backbone.attention` asks for."""
    return platform in _PLATFORMS.get(kind, (platform,))


def choose(kind: Choice, platform: str, config: DecoderConfig) -> Kind:
    """Chooses what `backbone.attention` means on devices of a platform; auto is splash on TPU and XLA elsewhere.

    Raises:
      UserError: the platform has no such kernel, or the kernel cannot do what the backbone needs.
    """
    if kind == "auto":
        return "splash" if platform == "tpu" else "xla"
    if not runs_on(kind, platform):
        needed = _PLATFORMS[kind][0].upper()
        raise UserError(f"backbone.attention={kind} needs a {needed}, here is {platform}; set it to auto")
    if kind == "cudnn" and config.attention_cap:
        raise UserError("backbone.attention=cudnn has no soft cap, which this backbone's scores need; set it to auto")
    return kind


def whole_rows(kind: Kind, segment_ids: jax.Array, config: DecoderConfig) -> Callable[..., jax.Array]:
    """Attention of rows to themselves: (q [B, T, H, C], k and v [B, T, G, C], window=[]) -> [B, T, H, C].

    Args:
      kind: of `choose`.
      segment_ids: [B, T] int32.
      config: gives the scale and the cap of the scores, and the windows that occur.
    """
    scale, cap = config.attention_scale, config.attention_cap
    if kind == "cudnn":
        from e2p_jax.backbone.kernels import cudnn_attention

        index = jnp.arange(segment_ids.shape[1])
        visible = visibility(segment_ids, segment_ids, index, index)
        return lambda q, k, v, window: cudnn_attention(q, k, v, within(visible, window), scale=scale)
    if kind == "splash":
        from e2p_jax.backbone.kernels import splash_attention  # Pallas takes long to import

        attend = on_each_device(functools.partial(splash_attention, windows=config.windows, scale=scale, cap=cap))
    else:
        attend = on_each_device(functools.partial(block_attention, scale=scale, cap=cap))
    return lambda q, k, v, window: attend(q, k, v, segment_ids, window)


def visibility(
    query_segments: jax.Array, key_segments: jax.Array, query_index: jax.Array, key_index: jax.Array
) -> jax.Array:
    """Says which keys a query may see: those of its own segment, at or before its own place.

    Args:
      query_segments: [B, T] int32; 0 is padding.
      key_segments: [B, S] int32.
      query_index: [T] int32, the queries' places in the row.
      key_index: [S] int32.

    Returns:
      [B, T, S] int32: 0 where hidden, else 1 + the distance back, which a window compares with its width.
    """
    distance = query_index[:, None] - key_index[None, :]  # [T, S]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return jnp.where(same & (distance >= 0)[None], distance[None] + 1, 0)


def within(visible: jax.Array, window: jax.Array | int) -> jax.Array:
    """The positions of `visibility` that a window (0 is unlimited) leaves visible, as booleans."""
    return (visible > 0) & ((visible <= window) | (jnp.asarray(window) == 0))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    window: jax.Array | int,
    *,
    scale: float | None = None,
    cap: float = 0.0,
) -> jax.Array:
    """Scaled dot-product attention with grouped queries (Ainslie et al., arXiv 2305.13245).

    Args:
      q: [B, T, H, C].
      k: [B, S, G, C], G dividing H.
      v: [B, S, G, C].
      visible: [B, T, S] int32 from `visibility`.
      window: scalar; a query sees at most this many positions, itself included; 0 is unlimited.
      scale: of the scores; None is C**-0.5.
      cap: soft cap of the scores, 0 for none.

    Returns:
      [B, T, H, C] in q's dtype. Scores and softmax are float32.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    chex.assert_shape([k, v], (batch, None, groups, width))
    repeats = heads // groups
    # Heads before positions, and a group's queries in one matrix: both products become plain batched matmuls,
    # which XLA on CPU runs 3x faster than the same contraction over [B, T, H, C].
    q = q.reshape(batch, length, groups, repeats, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, groups, repeats * length, width) * jnp.asarray(scale or width**-0.5, q.dtype)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, G, S, C]
    scores = jnp.einsum("bgtc,bgsc->bgts", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, cap).reshape(batch, groups, repeats, length, -1)
    # Added, not selected: XLA on CPU fuses a select into both softmax reductions and runs 2x slower.
    bias = jnp.where(within(visible, window), 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bgts,bgsc->bgtc", weights.reshape(batch, groups, repeats * length, -1), v)
    mixed = mixed.reshape(batch, groups, repeats, length, width)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
