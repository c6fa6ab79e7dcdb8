"""The norms of all families."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from e2p_jax.backbone.layout import DecoderConfig


def norm(x: jax.Array, params: Mapping[str, jax.Array], name: str, config: DecoderConfig) -> jax.Array:
    """RMSNorm (Zhang & Sennrich, arXiv 1910.07467) or LayerNorm (Ba et al., arXiv 1607.06450) over the last axis.

    Computed in float32. Families differ in whether the weight is applied before or after the return to x's dtype.
    A family without this norm leaves x as it is.
    """
    if name not in params:
        return x

    def row(name: str) -> jax.Array:
        return jnp.expand_dims(params[name], tuple(range(x.ndim - 1)))

    y = x.astype(jnp.float32)
    if config.norm.startswith("layer"):
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_epsilon)
    if config.norm == "rms":
        return y.astype(x.dtype) * row(name).astype(x.dtype)
    y = y * (row(name).astype(jnp.float32) + (1.0 if config.norm == "rms_one_plus" else 0.0))
    if config.norm == "layer":
        y = y + row(f"{name}_bias").astype(jnp.float32)
    return y.astype(x.dtype)
