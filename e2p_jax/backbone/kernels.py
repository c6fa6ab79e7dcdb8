"""Attention kernels of accelerators: the TPU's splash attention, cuDNN's and tokamax's; all are `attention.attention`.

cuDNN's and tokamax's were compared with float32 on an H100 (`benchmarks/card.py check`). Splash has not run on a TPU
yet: it compiles ahead of time, and is compared with the XLA path in Pallas's interpreter.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from e2p_jax.backbone.blocks import SAVED
from e2p_jax.parallel.private_jax import cudnn_primitives

SPLASH_BLOCKS = (512, 256, 128)  # the first that divides T; 128 lanes are the least
SPLASH_FUSED = False  # one kernel backward in place of two; its partial sums grow with T^2: docs/performance.md


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
        block_q_dq=None if SPLASH_FUSED else block,
        block_kv_dq=None if SPLASH_FUSED else block,
        use_fused_bwd_kernel=SPLASH_FUSED,
    )

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

    ways = [of_width(width) for width in _distinct(windows, length)]
    return _of_window(ways, window, windows, length)(q, k, v, segment_ids)


def _distinct(windows: Sequence[int], length: int) -> list[int]:
    """Widths that hide anything of rows of T positions; 0 is none, and that of all windows that hide nothing."""
    return sorted({width if 0 < width < length else 0 for width in windows})


def _of_window(
    ways: Sequence[Callable[..., jax.Array]], window: jax.Array | int, windows: Sequence[int], length: int
) -> Callable[..., jax.Array]:
    """Of one way for each of the distinct windows, that of a layer's window, which is known when it runs."""
    if len(ways) == 1:
        return ways[0]
    window = jnp.asarray(window, jnp.int32)
    which = jnp.searchsorted(jnp.asarray(_distinct(windows, length), jnp.int32), jnp.where(window < length, window, 0))
    return functools.partial(jax.lax.switch, which, ways)


def _begins(segment_ids: jax.Array) -> jax.Array:
    """[B, T] bool: another segment than just before, or the row, begins here."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def packed_layout(segment_ids: jax.Array, segments: int, longest: int | None = None) -> jax.Array:
    """What cuDNN wants to know of the rows of one device, which it takes as one long row of shorter ones.

    Its cost and its memory grow with pieces times a row's length: 32 segments of 64 in rows of 2,048, with 32 heads,
    take 7.3 GiB and 8.7 ms of an H100 less in rows of 128 (16 layers, 8 rows).

    Args:
      segment_ids: [B, T] int32, each segment in one piece, in front of any padding, which is taken in pieces of L, too,
        for nothing may stay unwritten.
      segments: S, the most that a row has.
      longest: L, a divisor of T: no segment is longer; None is T.

    Returns:
      [B*T/L, 2M + 1] int32, of rows of L positions: of all pieces in their order, M + 1 columns of where they begin, in
      positions from the start of the first row, then M of how long they are. Behind the last stand the end and 0.
    """
    batch, length = segment_ids.shape
    longest = longest or length
    parts = length // longest  # of a row; so many pieces are there of padding, at most
    end, pieces = batch * length, min(-(-(segments + parts) // parts), longest)
    batch = batch * parts
    index = jnp.arange(end, dtype=jnp.int32)
    begins = _begins(segment_ids).ravel() | ((segment_ids.ravel() == 0) & (index % longest == 0))
    starts = jnp.sort(jnp.where(begins, index, end))
    starts = jnp.pad(starts, (0, batch), constant_values=end)[: batch * (pieces + 1)]
    lengths = jnp.diff(starts)[: batch * pieces]
    return jnp.concatenate([starts.reshape(batch, -1), lengths.reshape(batch, -1)], axis=1)


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: jax.Array,
    window: jax.Array | int,
    windows: Sequence[int],
    *,
    scale: float,
) -> jax.Array:
    """Attention of whole rows by cuDNN, every segment a sequence of its own length: Hopper and newer; on one device.

    Args:
      q: [B, T, H, C], bfloat16 or float16; C a multiple of 8, at most 256.
      k: [B, T, G, C].
      v: [B, T, G, C].
      layout: of `packed_layout`, whose rows are the ones that cuDNN gets.
      window: scalar int32, one of `windows`.
      windows: those that occur in any layer; each is a call of its own.
      scale: of the scores.

    Returns:
      [B, T, H, C].
    """
    length = q.shape[1]
    ways = [functools.partial(_kept, _Cudnn(scale, width)) for width in _distinct(windows, length)]
    parts = [x.reshape(layout.shape[0], -1, *x.shape[2:]) for x in (q, k, v)]
    return _of_window(ways, window, windows, length)(*parts, layout).reshape(q.shape)


class _Cudnn(NamedTuple):
    """cuDNN's calls, for `_kept`."""

    scale: float
    window: int

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, layout: jax.Array, trains: bool) -> tuple:
        return tuple(self._call(0, q, k, v, layout, is_training=trains))

    def backward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, layout: jax.Array, out: jax.Array, rest: tuple, grad: jax.Array
    ) -> tuple:
        return tuple(self._call(1, q, k, v, layout, *rest, out, grad))

    def _call(
        self, which: int, q: jax.Array, k: jax.Array, v: jax.Array, layout: jax.Array, *more: jax.Array, **options: bool
    ) -> list[jax.Array]:
        *calls, common = cudnn_primitives()
        starts, lengths = jnp.split(layout, [layout.shape[1] // 2 + 1], axis=1)
        places = [starts * (x.shape[2] * x.shape[3]) for x in (q, k)]  # in numbers, not positions
        absent = jnp.zeros(0, q.dtype)
        inputs = q, k, v, absent, lengths, lengths, *places, absent, absent, *more
        settings = common | {"scale": self.scale, "sliding_window_length": self.window or None}
        return calls[which].bind(*inputs, **settings, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, of_rows: jax.Array) -> jax.Array:
    """A kernel whose results a checkpoint policy finds by the name `SAVED`, so that it runs once in a training step."""
    return kernel.forward(q, k, v, of_rows, False)[0]


def _kept_forward(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, of_rows: jax.Array) -> tuple[jax.Array, tuple]:
    out, *rest = jax.tree.map(lambda x: checkpoint_name(x, SAVED), kernel.forward(q, k, v, of_rows, True))
    return out, (q, k, v, of_rows, out, tuple(rest))


def _kept_backward(kernel: Any, saved: tuple, grad: jax.Array) -> tuple:
    return *kernel.backward(*saved, grad), None


_kept.defvjp(_kept_forward, _kept_backward)


def first_keys(segment_ids: jax.Array) -> jax.Array:
    """[B, T] int32 -> [B, T] int32: the first place of each place's own segment."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    return jax.lax.cummax(jnp.where(_begins(segment_ids), index, 0), axis=1)


def mosaic_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    window: jax.Array | int,
    *,
    scale: float,
    cap: float = 0.0,
) -> jax.Array:
    """Attention of whole rows by tokamax's Mosaic kernels of Hopper and newer, soft cap included; on one device.

    Args:
      q: [B, T, H, C], bfloat16 or float16.
      k: [B, T, G, C].
      v: [B, T, G, C].
      first: of `first_keys`.
      window: scalar; a query sees at most this many positions, itself included; 0 is unlimited.
      scale: of the scores.
      cap: soft cap of the scores, 0 for none.

    Returns:
      [B, T, H, C].
    """
    window = jnp.asarray(window, jnp.int32)
    near = jnp.arange(q.shape[1], dtype=jnp.int32)[None] - window + 1
    first = jnp.where(window > 0, jnp.maximum(first, near), first)
    return _kept(_Mosaic(scale, cap), q, k, v, first)


class _Mosaic(NamedTuple):
    """tokamax's calls, for `_kept`."""

    scale: float
    cap: float

    def _bound(self, q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> tuple[Any, Any]:
        from tokamax._src.ops.attention.base import Mask
        from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

        op = PallasMosaicGpuFlashAttention()
        mask = Mask(k_start=first[:, None], is_causal=True)
        return op, op.bind(q, k, v, mask=mask, logits_scale=self.scale, logits_soft_cap=self.cap or None)

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, trains: bool) -> tuple:
        op, bound = self._bound(q, k, v, first)
        result = op(*bound.args, **bound.kwargs | {"return_residuals": trains})
        return result if trains else (result,)

    def backward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, out: jax.Array, rest: tuple, grad: jax.Array
    ) -> tuple:
        op, bound = self._bound(q, k, v, first)
        given = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
        grads = op.vjp(*rest, out, grad, *bound.args, **given)
        return grads["q"], grads["k"], grads["v"]
