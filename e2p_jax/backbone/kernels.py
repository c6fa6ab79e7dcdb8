"""Attention kernels of accelerators, the TPU's splash attention and cuDNN's; both compute `attention.attention`.

Neither has run on its hardware yet. Splash compiles ahead of time for TPU and is compared with the XLA path in
Pallas's interpreter; cuDNN is only known to be called as its interface asks.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from e2p_jax.backbone.blocks import SAVED

SPLASH_BLOCKS = (512, 256, 128)  # the first that divides T; 128 lanes are the least


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: jax.Array | int,
    windows: Sequence[int],
    *,
    scale: float,
    cap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """Attention of whole rows that skips the blocks that causality or a window hides; on one device.

    Args:
      q: [B, T, H, C], T a multiple of 128.
      k: [B, T, G, C].
      v: [B, T, G, C].
      segment_ids: [B, T] int32.
      window: scalar int32, one of `windows`.
      windows: those that occur in any layer; each is a kernel of its own.
      scale: of the scores.
      cap: soft cap of the scores, 0 for none.
      interpret: run without a TPU, slowly.

    Returns:
      [B, T, H, C].
    """
    length = q.shape[1]
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    distinct = sorted({w if 0 < w < length else 0 for w in windows})

    def of_width(width: int) -> Callable[..., jax.Array]:
        shape = (length, length)
        mask = splash.LocalMask(shape, (width - 1, 0), 0) if width else splash.CausalMask(shape)

        def device(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
            kernel = splash.make_splash_mha(
                splash.MultiHeadMask([mask] * q.shape[2]),
                block_sizes=blocks,
                head_shards=1,
                q_seq_shards=1,
                attn_logits_soft_cap=cap or None,
                residual_checkpoint_name=SAVED,
                interpret=interpret,
            )
            heads_first = [x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v)]
            return jax.vmap(kernel)(*heads_first, splash.SegmentIds(segment_ids, segment_ids)).swapaxes(1, 2)

        return device

    window = jnp.asarray(window, jnp.int32)
    which = jnp.searchsorted(jnp.asarray(distinct, jnp.int32), jnp.where(window < length, window, 0))
    return jax.lax.switch(which, [of_width(width) for width in distinct], q, k, v, segment_ids)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float) -> jax.Array:
    """Fused attention of cuDNN, forward and backward; the mask goes in as a bias, so that no block is skipped.

    Args:
      q: [B, T, H, C], bfloat16 or float16.
      k: [B, T, G, C].
      v: [B, T, G, C].
      mask: [B, T, T] bool, True where a query sees a key.
      scale: of the scores.

    Returns:
      [B, T, H, C].
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")
