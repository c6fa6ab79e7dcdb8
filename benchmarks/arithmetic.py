"""What the mathematics of a training step needs, and what the device does at best: what speed is a share of."""

from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

from e2p_jax.backbone.families import DecoderConfig


def needed_flops(config: DecoderConfig, batch: dict[str, np.ndarray]) -> float:
    """Of one step: no padding, no recomputation, no weight gradients.

    4 for each weight of the layers and token (forward, and back to the input); attention's two products, forward once
    and backward twice, over the visible pairs; 4 for each weight of the head and target.
    """
    c, segments = config, batch["segment_ids"]
    heads, groups = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.hidden_size * (2 * heads + 2 * groups) + 3 * c.hidden_size * c.intermediate_size
    tokens = int((segments > 0).sum())
    pairs = int(sum(batch["positions"][segments > 0].astype(np.int64) + 1))
    targets = float(batch["target_weights"].sum())
    attention = 3 * 2 * 2 * pairs * heads
    return c.num_layers * (4 * layer * tokens + attention) + 4 * c.vocab_size * c.hidden_size * targets


def matmul_rate(dtype: Any, size: int, clock: measure.Clock) -> float:
    """FLOPs a second of one large product on this device, measured: what utilisation is a share of."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    contender = measure.Contender("matmul", lambda: product(a).block_until_ready(), 2.0 * size**3)
    measure.take_turns([contender], 5, clock)
    return contender.amount / min(contender.seconds)
