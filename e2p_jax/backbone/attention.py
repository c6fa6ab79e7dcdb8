"""Masked attention over packed rows."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from e2p_jax.backbone.blocks import block_attention, soft_cap
from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import by_device, on_each_device
from e2p_jax.products import einsum

Kind = Literal["xla", "splash", "cudnn", "mosaic"]
Choice = Literal["auto", "xla", "splash", "cudnn", "mosaic"]
TRUNK = -1  # in a cache, the number of a segment that every one behind it goes on from, each for itself
_PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "mosaic": "gpu"}
# XLA writes a kernel's results right into the stack that the backward pass reads, by a second run of it.
COMPILER_OPTIONS = {"mosaic": {"xla_gpu_enable_dynamic_slice_fusion": False}}
_BEST: dict[str, tuple[Kind, ...]] = {
    "tpu": ("splash",),
    "gpu": ("cudnn", "mosaic"),
}  # of a platform, the first that can


def choose(kind: Choice, device: Any, config: DecoderConfig, dtype: jnp.dtype) -> Kind:
    """Chooses what `backbone.attention` means on a device; auto is plain XLA where no kernel can do it.

    Args:
      device: gives `platform`, and of a GPU `compute_capability`.
      dtype: of the activations.

    Raises:
      UserError: the device has no such kernel, or the kernel cannot do what the backbone needs.
    """
    if kind == "auto":
        return next(
            one for one in (*_BEST.get(device.platform, ()), "xla") if lacking(one, device, config, dtype) is None
        )
    if lack := lacking(kind, device, config, dtype):
        raise UserError(f"backbone.attention={kind} {lack}; set it to auto")
    return kind


def lacking(kind: Choice, device: Any, config: DecoderConfig, dtype: jnp.dtype) -> str | None:
    """Says what a kind of attention lacks on a device, as `choose` takes it, for a backbone; None is nothing."""
    platform = _PLATFORMS.get(kind, device.platform)
    if device.platform != platform:
        return f"needs a {platform.upper()}, here is {device.platform}"
    if kind in _PLATFORMS and config.sinks:
        return "has no attention sinks, which this backbone's softmax needs"
    if platform != "gpu" or kind not in _BEST["gpu"]:
        return None
    if dtype == jnp.float32:
        return "multiplies bfloat16 alone, and backbone.dtype is float32"
    if float(device.compute_capability) < 9:
        return f"needs Hopper or newer (compute capability 9.0), here is {device.compute_capability}"
    if kind == "cudnn" and config.attention_cap:
        return "has no soft cap, which this backbone's scores need"
    if kind == "cudnn" and (config.head_dim % 8 or config.head_dim > 256):
        return f"takes heads of multiples of 8 up to 256, and this backbone's are {config.head_dim} wide"
    if kind == "mosaic" and importlib.util.find_spec("tokamax") is None:
        return "needs tokamax (pip install 'e2p-jax[kernels]')"
    return None


def whole_rows(
    kind: Kind, segment_ids: jax.Array, config: DecoderConfig, segments: int, longest: int | None = None
) -> Callable[..., jax.Array]:
    """Attention of rows to themselves: (q [B, T, H, C], k and v [B, T, G, C], window=[], sinks=[H] or None) ->
    [B, T, H, C].

    Args:
      kind: of `choose`.
      segment_ids: [B, T] int32.
      config: gives the scale and the cap of the scores, and the windows that occur.
      segments: S, the most that a row has.
      longest: L, a divisor of T: no segment is longer; None is T.
    """
    scale, cap, windows = config.attention_scale, config.attention_cap, config.windows
    of_rows = segment_ids  # what a kernel wants to know of them, worked out once for all layers
    if kind == "xla":
        attend: Callable[..., jax.Array] = functools.partial(block_attention, scale=scale, cap=cap)
    else:
        from e2p_jax.backbone import kernels  # Pallas takes long to import

        if kind == "splash":
            attend = functools.partial(kernels.splash_attention, windows=windows, scale=scale, cap=cap)
        elif kind == "cudnn":
            of_rows = by_device(
                functools.partial(kernels.packed_layout, segments=segments, longest=longest), segment_ids
            )
            attend = functools.partial(kernels.cudnn_attention, windows=windows, scale=scale)
        else:
            of_rows = kernels.first_keys(segment_ids)
            attend = functools.partial(kernels.mosaic_attention, scale=scale, cap=cap)
    attend = on_each_device(attend)
    return lambda q, k, v, window, sinks: attend(q, k, v, of_rows, window, *(() if sinks is None else (sinks,)))


def visibility(
    query_segments: jax.Array, key_segments: jax.Array, query_positions: jax.Array, key_positions: jax.Array
) -> jax.Array:
    """Says which keys a query may see: those of its own segment and of the trunk, at or before its own position.

    Args:
      query_segments: [B, T] int32; 0 is padding.
      key_segments: [B, S] int32; `TRUNK` is what all segments of the row go on from.
      query_positions: [B, T] int32, the queries' places in their segments, a trunk counted in.
      key_positions: [B, S] int32.

    Returns:
      [B, T, S] int32: 0 where hidden, else 1 + the distance back, which a window compares with its width.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    keys = key_segments[:, None, :]
    seen = (query_segments[:, :, None] == keys) | (keys == TRUNK)
    return jnp.where(seen & (distance >= 0), distance + 1, 0)


def within(visible: jax.Array, window: jax.Array | int) -> jax.Array:
    """The positions of `visibility` that a window (0 is unlimited) leaves visible, as booleans."""
    return (visible > 0) & ((visible <= window) | (jnp.asarray(window) == 0))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    window: jax.Array | int,
    sinks: jax.Array | None = None,
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
      sinks: [H], a score beside those of the keys that takes its share of the weights and gives nothing; None is none.
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
    scores = einsum("bgtc,bgsc->bgts", q, k, out=jnp.float32)
    scores = soft_cap(scores, cap).reshape(batch, groups, repeats, length, -1)
    # Added, not selected: XLA on CPU fuses a select into both softmax reductions and runs 2x slower.
    bias = jnp.where(within(visible, window), 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    scores = scores + bias
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    else:
        own = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, groups, repeats, 1, 1), (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)[..., :-1].astype(v.dtype)
    mixed = einsum("bgts,bgsc->bgtc", weights.reshape(batch, groups, repeats * length, -1), v)
    mixed = mixed.reshape(batch, groups, repeats, length, width)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
