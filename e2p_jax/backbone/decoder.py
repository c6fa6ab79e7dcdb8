"""The frozen LLM: a decoder-only transformer whose layers are one scan over stacked weights.

Axis letters: B rows, T positions, D model width, L layers, H heads, G key-value heads, C head width,
F feed-forward width, V vocabulary, S cache length. Weights keep the Hugging Face orientation [out, in],
so that loading and saving copy bytes.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from e2p_jax.backbone.attention import attention, visibility
from e2p_jax.backbone.families import DecoderConfig, rope_frequencies
from e2p_jax.parallel.mesh import shard_rows


class Cache(NamedTuple):
    """Keys and values of the positions seen so far."""

    keys: jax.Array  # [L, B, S, G, C]
    values: jax.Array  # [L, B, S, G, C]
    segments: jax.Array  # [B, S] int32, 0 where empty
    filled: jax.Array  # [] int32, positions written


# Of random token embeddings. At GPT-2's 0.02 the directions that words of a kind come to share drown what tells them
# apart, and with it what a head could copy: on the generated personas reading began at 0.4 million tokens from 0.1,
# and had not at 0.7 million from 0.02 (4 layers, width 128, both with the attention below and learning rate 1e-3).
EMBEDDING_SCALE = 0.1


class Layers(nnx.Module):
    """All layers' parameters, stacked on axis 0.

    Random ones start like GPT-2's (normal(0.02), residual outputs smaller), and attention starts mimetic
    (Trockman & Kolter, arXiv 2305.09828): W_Q W_K' and W_O W_V are near a multiple of the identity, so a fresh head
    looks for tokens like the one it expects and copies them. A small decoder then learns to read its context within
    a few hundred steps, where from plain noise it had not begun after 2 million tokens.
    """

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = config
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def normal(rows: int, columns: int, scale: float = 0.02) -> nnx.Param:
            shape = (c.num_layers, rows, columns)
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape, dtype))

        def constant(width: int, value: float) -> nnx.Param:
            return nnx.Param(jnp.full((c.num_layers, width), value, dtype))

        residual = 0.02 / (2 * c.num_layers) ** 0.5
        kv_rows = jnp.arange(kv_width) % c.hidden_size
        q_rows = jnp.repeat(kv_rows.reshape(c.num_kv_heads, c.head_dim), c.num_heads // c.num_kv_heads, axis=0).ravel()

        def mimetic(gain: float) -> tuple[jax.Array, jax.Array]:
            """Rows of one random rotation a layer, for queries [L, H*C, D] and for keys or values [L, G*C, D]."""
            rotation = jax.random.orthogonal(rngs.params(), c.hidden_size, (c.num_layers,)) * gain
            return rotation[:, q_rows].astype(dtype), rotation[:, kv_rows].astype(dtype)

        (q, k), (o, v) = mimetic(0.7), mimetic(0.22)
        self.attention_norm = constant(c.hidden_size, 1.0)
        self.q = nnx.Param(q + normal(q_width, c.hidden_size)[...])
        self.k = nnx.Param(k + normal(kv_width, c.hidden_size)[...])
        self.v = nnx.Param(v + normal(kv_width, c.hidden_size)[...])
        self.o = nnx.Param(o.swapaxes(1, 2) + normal(c.hidden_size, q_width, residual)[...])
        self.mlp_norm = constant(c.hidden_size, 1.0)
        self.gate = normal(c.intermediate_size, c.hidden_size)
        self.up = normal(c.intermediate_size, c.hidden_size)
        self.down = normal(c.hidden_size, c.intermediate_size, residual)
        if c.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = constant(q_width, 0), constant(kv_width, 0), constant(kv_width, 0)
        if c.output_bias:
            self.o_bias = constant(c.hidden_size, 0)
        if c.mlp_bias:
            self.gate_bias, self.up_bias = constant(c.intermediate_size, 0), constant(c.intermediate_size, 0)
            self.down_bias = constant(c.hidden_size, 0)


class Decoder(nnx.Module):
    """Embed -> layers -> final norm -> logits, as separate methods, so that each caller pays for what it uses."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, remat: bool = False, rngs: nnx.Rngs):
        self.config, self.remat = config, remat
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(EMBEDDING_SCALE * jax.random.normal(rngs.params(), shape, dtype))
        self.layers = Layers(config, dtype=dtype, rngs=rngs)
        self.final_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_head:
            self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))

    @property
    def output_embedding(self) -> jax.Array:
        """[V, D]: the head's rows."""
        return (self.embedding if self.config.tie_head else self.head)[...]

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T] int32 -> [B, T, D]."""
        return jnp.take(self.embedding[...], tokens, axis=0)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32."""
        return jnp.einsum("...d,vd->...v", hidden, self.output_embedding, preferred_element_type=jnp.float32)

    def empty_cache(self, batch: int, length: int) -> Cache:
        c = self.config
        shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
        keys = jnp.zeros(shape, self.embedding[...].dtype)
        return Cache(keys, jnp.zeros_like(keys), jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32))

    def __call__(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the layers and the final norm.

        Args:
          x: [B, T, D] input embeddings.
          positions: [B, T] int32, place inside the own segment (the rotary angle).
          segment_ids: [B, T] int32; attention stays inside a segment.
          cache: keys and values so far; the T new positions are appended to it.

        Returns:
          [B, T, D] hidden states, and the cache with the new positions (None without a cache).
        """
        batch, length, _ = x.shape
        chex.assert_shape([positions, segment_ids], (batch, length))
        c = self.config
        index = jnp.arange(length)
        if cache is None:
            kv: tuple[Any, Any] = (None, None)
            filled, segments, key_index = jnp.zeros((), jnp.int32), segment_ids, index
        else:
            filled = cache.filled
            segments = jax.lax.dynamic_update_slice(cache.segments, segment_ids, (0, filled))
            key_index = jnp.arange(segments.shape[1])
            kv = (cache.keys, cache.values)
        visible = visibility(segment_ids, segments, index + filled, key_index)
        frequencies = jnp.asarray(rope_frequencies(c.rope, c.head_dim), jnp.float32)
        angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]  # [B, T, C/2]
        cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]  # [B, T, 1, C/2]

        def body(x: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
            p, window, cached_k, cached_v = inputs
            h = rms_norm(x, p["attention_norm"], c.norm_epsilon)
            q = rotate(linear(h, p, "q").reshape(batch, length, c.num_heads, c.head_dim), cos, sin)
            k = rotate(linear(h, p, "k").reshape(batch, length, c.num_kv_heads, c.head_dim), cos, sin)
            v = linear(h, p, "v").reshape(batch, length, c.num_kv_heads, c.head_dim)
            if cached_k is not None:
                k = cached_k = jax.lax.dynamic_update_slice(cached_k, k, (0, filled, 0, 0))
                v = cached_v = jax.lax.dynamic_update_slice(cached_v, v, (0, filled, 0, 0))
            mixed = attention(q, k, v, visible, window).reshape(batch, length, c.num_heads * c.head_dim)
            x = x + linear(mixed, p, "o")
            h = rms_norm(x, p["mlp_norm"], c.norm_epsilon)
            x = x + linear(jax.nn.silu(linear(h, p, "gate")) * linear(h, p, "up"), p, "down")
            return shard_rows(x), (cached_k, cached_v)

        if self.remat:
            body = jax.checkpoint(body)
        params = nnx.to_pure_dict(nnx.state(self.layers, nnx.Param))
        windows = jnp.asarray(c.windows, jnp.int32)
        x, (keys, values) = jax.lax.scan(body, shard_rows(x), (params, windows, *kv))
        x = rms_norm(x, self.final_norm[...], c.norm_epsilon)
        return x, None if cache is None else Cache(keys, values, segments, filled + length)


def linear(x: jax.Array, params: dict[str, jax.Array], name: str) -> jax.Array:
    """Returns x @ W.T + b with W [out, in] and, where the family has one, the bias `<name>_bias`."""
    y = jnp.einsum("...i,oi->...o", x, params[name])
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm (Zhang & Sennrich, arXiv 1910.07467) in float32, back to x's dtype before the scale, as Llama does."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype) * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split layout: [B, T, heads, C] with float32 cos, sin [B, T, 1, C/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
