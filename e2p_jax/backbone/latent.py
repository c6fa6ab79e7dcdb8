"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values are made of one vector a
position, which is what a cache keeps, beside a rotated key that all heads share.

Axis letters beside the decoder's: Z latent width, R rotated numbers of a head, which come first in it here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.backbone.mlp import linear
from e2p_jax.backbone.norm import norm

_EPSILON = 1e-6  # of the latents' norms, whatever that of the others is


def project(h: jax.Array, params: dict[str, Any], config: DecoderConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, T, D] -> queries [B, T, H, C], the shared key [B, T, 1, R] and the latents [B, T, 1, Z], not rotated yet."""
    c = dataclasses.replace(config, norm_epsilon=_EPSILON)
    batch, length, _ = h.shape
    read = norm(linear(h, params, "q_latent"), params, "q_latent_norm", c) if c.query_latent_size else h
    q = linear(read, params, "q").reshape(batch, length, c.num_heads, c.head_dim)
    plain = c.head_dim - c.shared_key_size
    q = jnp.concatenate([q[..., plain:], q[..., :plain]], axis=-1)
    latents = norm(linear(h, params, "latent"), params, "latent_norm", c)
    return q, linear(h, params, "k_shared")[:, :, None], latents[:, :, None]


def expand(
    shared: jax.Array, latents: jax.Array, params: dict[str, Any], config: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Rotated shared keys [B, S, 1, R] and latents [B, S, 1, Z] -> keys and values, both [B, S, H, C].

    Values end in zeros, which attention hands through.
    """
    c, (batch, length, _, _) = config, latents.shape
    k, v = (linear(latents[:, :, 0], params, name).reshape(batch, length, c.num_heads, -1) for name in ("k", "v"))
    k = jnp.concatenate([jnp.broadcast_to(shared, (*k.shape[:3], c.shared_key_size)), k], axis=-1)
    return k, jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, c.head_dim - c.value_size)))
