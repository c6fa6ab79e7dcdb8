"""The frozen LLM: a decoder-only transformer whose layers are a scan over stacked weights, or one for each run of them
that are alike; runs that come again and again are scanned over, too.

Axis letters: B rows, T positions, D model width, L layers, H heads, G key-value heads, C head width,
F feed-forward width, X experts, V vocabulary, S cache length. Weights keep the Hugging Face orientation [out, in],
so that loading and saving copy bytes.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from e2p_jax.backbone import latent
from e2p_jax.backbone.adapter import Adapters
from e2p_jax.backbone.attention import TRUNK, attention, visibility, whole_rows
from e2p_jax.backbone.blocks import SAVED, soft_cap
from e2p_jax.backbone.delta import delta_attention, segment_runs
from e2p_jax.backbone.layout import (
    PLAIN,
    DecoderConfig,
    Execution,
    Period,
    Run,
    cache_shapes,
    layer_shapes,
    layers_with,
    matrix_shapes,
    periods,
)
from e2p_jax.backbone.mlp import Params, linear, mlp
from e2p_jax.backbone.norm import norm
from e2p_jax.backbone.rope import Rope
from e2p_jax.parallel.mesh import shard_decoded, shard_heads, shard_rows
from e2p_jax.products import einsum


class Cache(NamedTuple):
    """What the layers keep of the positions seen so far."""

    kept: dict[str, jax.Array]  # each of `layout.cache_shapes`, [L, B, ...] over the layers that keep it
    segments: jax.Array  # [B, S] int32, 0 where empty
    positions: jax.Array  # [B, S] int32
    filled: jax.Array  # [] int32, positions written


Kept = dict[str, jax.Array] | None  # `Cache.kept`
Mixed = tuple[jax.Array, Kept]  # what attention adds to the residual, and the cache with the new positions
Layer = jax.Array | int  # its number: of layers written out one after the other, one that the compiler knows

# Rounded, they choose other experts, and a state would decay at another rate.
EXACT = ("router_choice_bias", "linear_log_rate", "linear_step_bias")

# Of random token embeddings. At GPT-2's 0.02 the directions that words of a kind come to share drown what tells them
# apart, and with it what a head could copy: on the generated personas reading began at 0.4 million tokens from 0.1,
# and had not at 0.7 million from 0.02 (4 layers, width 128, both with the attention below and learning rate 1e-3).
EMBEDDING_SCALE = 0.1

# Of a layer's activations the backward pass keeps what matrix products and attention gave, and works out the rest
# again: less to write and read than to compute. What is named SAVED it finds in place of the products it came from:
# queries and keys as attention reads them, and the residual behind attention.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(SAVED)
)


class Layers(nnx.Module):
    """All layers' parameters, each stacked on axis 0 over the layers that have it.

    Random ones start like GPT-2's (normal(0.02), residual outputs smaller), and attention starts mimetic
    (Trockman & Kolter, arXiv 2305.09828): W_Q W_K' and W_O W_V are near a multiple of the identity, so a fresh head
    looks for tokens like the one it expects and copies them. With `EMBEDDING_SCALE` it decides whether a small decoder
    learns to read its context at all within a few million tokens (docs/backbone.md).
    """

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, shapes = config, layer_shapes(config)
        count = {name: len(layers_with(c, name)) for name in shapes}

        def normal(name: str, scale: float = 0.02) -> jax.Array:
            return scale * jax.random.normal(rngs.params(), (count[name], *shapes[name]), dtype)

        rotations: dict[str, jax.Array] = {}
        kv_rows = jnp.arange(c.num_kv_heads * c.head_dim) % c.hidden_size
        q_rows = jnp.repeat(kv_rows.reshape(c.num_kv_heads, c.head_dim), c.num_heads // c.num_kv_heads, axis=0).ravel()

        def mimetic(gain: float) -> tuple[jax.Array, jax.Array]:
            """Rows of one random rotation a layer, for queries [L, H*C, D] and for keys or values [L, G*C, D]."""
            rotation = jax.random.orthogonal(rngs.params(), c.hidden_size, (count["q"],)) * gain
            return rotation[:, q_rows].astype(dtype), rotation[:, kv_rows].astype(dtype)

        if not c.latent_size:
            (q, k), (o, v) = mimetic(0.7), mimetic(0.22)
            rotations = {"q": q, "k": k, "v": v, "o": o.swapaxes(1, 2)}
        for name, shape in shapes.items():
            if name in matrix_shapes(c):
                residual = name in ("o", "linear_o", "down", "expert_down", "shared_down")
                value = normal(name, 0.02 / (2 * c.num_layers) ** 0.5 if residual else 0.02)
                value = rotations[name] + value if name in rotations else value
            elif name.endswith("_taps"):
                value = normal(name, 0.3)
            elif name == "linear_log_rate":
                value = jnp.log(jax.random.uniform(rngs.params(), (count[name], *shape), minval=0.01, maxval=16.0))
            else:
                value = jnp.full((count[name], *shape), first_value(c, name), jnp.float32 if name in EXACT else dtype)
            setattr(self, name, nnx.Param(value))


def first_value(config: DecoderConfig, name: str) -> float:
    """Gives what a fresh norm or bias is filled with: what changes nothing, and of a state's decay 1."""
    if name in ("linear_out_norm", "linear_step_bias"):
        return 1.0
    return float(name.endswith("norm") and config.norm != "rms_one_plus")


class Decoder(nnx.Module):
    """Embed -> layers -> final norm -> logits, as separate methods, so that each caller pays for what it uses.

    Activations are in `dtype`, whatever the parameters are kept in: what trains is kept in float32.
    """

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, execution: Execution = PLAIN, rngs: nnx.Rngs):
        self.config, self.dtype, self.execution = config, dtype, execution
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(EMBEDDING_SCALE * jax.random.normal(rngs.params(), shape, dtype))
        self.layers = Layers(config, dtype=dtype, rngs=rngs)
        self.final_norm = nnx.Param(jnp.full((config.hidden_size,), first_value(config, "final_norm"), dtype))
        if config.norm == "layer":
            self.final_norm_bias = nnx.Param(jnp.zeros((config.hidden_size,), dtype))
        if config.learned_positions:
            places = (config.max_positions, config.hidden_size)
            self.position_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), places, dtype))
        if not config.tie_head:
            self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
        if config.head_bias:
            self.head_bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))

    @property
    def output_embedding(self) -> jax.Array:
        """[V, D]: the head's rows."""
        return (self.embedding if self.config.tie_head else self.head)[...].astype(self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T] int32 -> [B, T, D]: what the decoder is called with; a slot's vector takes the place of this."""
        return scaled(jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype), self.config.embedding_scale)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32."""
        hidden = self.before_head(hidden)
        scores = einsum("...d,vd->...v", hidden, self.output_embedding, out=jnp.float32)
        if (bias := self.output_bias) is not None:
            scores = scores + jnp.expand_dims(bias, tuple(range(scores.ndim - 1)))
        return soft_cap(scores, self.config.logit_cap)

    @property
    def output_bias(self) -> jax.Array | None:
        """[V] float32: what is added to logits, where the family has it."""
        return self.head_bias[...].astype(jnp.float32) if self.config.head_bias else None

    def before_head(self, hidden: jax.Array) -> jax.Array:
        """Hidden states with the factor that logits have."""
        return scaled(hidden, self.config.logit_scale)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for so many positions of each row; padding comes before a row's text, never in it."""
        kept = {
            name: jnp.zeros(
                (len(layers_with(self.config, name)), batch, *shape),
                jnp.float32 if name == "linear_state" else self.dtype,
            )
            for name, shape in cache_shapes(self.config, length).items()
        }
        kept |= {name: shard_heads(kept[name]) for name in ("k", "v") if name in kept}
        empty = jnp.zeros((batch, length), jnp.int32)
        return Cache(kept, empty, empty, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache | None = None,
        adapters: Adapters | None = None,
        most_segments: int | None = None,
        longest: int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the layers and the final norm.

        Args:
          x: [B, T, D] input embeddings.
          positions: [B, T] int32, place inside the own segment (the rotary angle, or which learned vector).
          segment_ids: [B, T] int32; attention stays inside a segment.
          cache: of the positions so far; the T new ones are appended to it. `branched` makes them what all segments
            of the T new ones go on from.
          adapters: stacked parameters beside the layers' matrices.
          most_segments: S, those that a row has at most; None is as many as positions. A kernel may allot for each.
          longest: L, a divisor of T: no segment is longer; None is T. So much a kernel may allot.

        Returns:
          [B, T, D] hidden states, and the cache with the new positions (None without a cache).
        """
        batch, length, _ = x.shape
        chex.assert_shape([positions, segment_ids], (batch, length))
        c = self.config
        if cache is None:
            filled, segments, places = jnp.zeros((), jnp.int32), segment_ids, positions
            attend = whole_rows(self.execution.attention, segment_ids, c, most_segments or length, longest)
        else:
            filled = cache.filled
            segments = jax.lax.dynamic_update_slice(cache.segments, segment_ids, (0, filled))
            places = jax.lax.dynamic_update_slice(cache.positions, positions, (0, filled))
            attend = functools.partial(
                attention,
                visible=visibility(segment_ids, segments, positions, places),
                scale=c.attention_scale,
                cap=c.attention_cap,
            )
        x = scaled(x, c.input_scale)
        if c.learned_positions:
            x = x + jnp.take(self.position_embedding[...], positions, axis=0).astype(x.dtype)
        ropes = [rope_tables(rope, positions) for rope in c.ropes]
        growth = query_growth(c, positions)
        # One rope for all layers is a constant of the scan; of several, each layer takes its own.
        stacked = jax.tree.map(lambda *tables: jnp.stack(tables), *ropes) if len(ropes) > 1 else None
        numbers = segment_runs(segment_ids)

        # Of one token a row, less is sent than of the weights.
        spread = shard_rows if cache is None or length > 1 else shard_decoded

        # Caches are carried and written where they stand: a scan that took and gave them would hold them twice.
        def self_attention(h: jax.Array, p: Params, layer: Layer, kept: Kept, window: Any, which: Any) -> Mixed:
            def heads(name: str, count: int) -> jax.Array:
                y = linear(h, p, name)
                y = norm(y, p, f"{name}_norm", c) if c.qk_norm == "all" else y
                y = y.reshape(batch, length, count, c.head_dim)
                return norm(y, p, f"{name}_norm", c) if c.qk_norm == "head" else y

            if c.latent_size:
                q, k, v = latent.project(h, p, c)
            else:
                q, k, v = heads("q", c.num_heads), heads("k", c.num_kv_heads), heads("v", c.num_kv_heads)
            if ropes:
                rope = ropes[0] if stacked is None else jax.tree.map(lambda table: table[which], stacked)
                cos, sin = rope
                q, k = rotate(q, cos, sin, c.interleaved), rotate(k, cos, sin, c.interleaved)
            if c.qk_norm == "rotated":
                q, k = norm(q, p, "q_norm", c), norm(k, p, "k_norm", c)
            q = q if growth is None else q * growth.astype(q.dtype)
            if c.qk_norm == "none":  # the gradient of a norm needs the products themselves
                q, k = checkpoint_name(q, SAVED), checkpoint_name(k, SAVED)
            if kept is not None:
                q, k, v = shard_heads(q), shard_heads(k), shard_heads(v)
                place = place_of(c, "k", layer)
                new = {
                    name: jax.lax.dynamic_update_slice(kept[name], value[None], (place, 0, filled, 0, 0))
                    for name, value in (("k", k), ("v", v))
                }
                k, v = (jax.lax.dynamic_index_in_dim(new[name], place, keepdims=False) for name in "kv")
                kept = kept | new
            k, v = latent.expand(k, v, p, c) if c.latent_size else (k, v)
            mixed = attend(q, k, v, window=window, sinks=p.get("sinks"))[..., : c.value_size]
            mixed = mixed.reshape(batch, length, c.num_heads * c.value_size)
            if c.gated_attention:
                mixed = mixed * jax.nn.sigmoid(linear(h, p, "q_gate"))
            return linear(mixed, p, "o"), kept

        def linear_attention(h: jax.Array, p: Params, layer: Layer, kept: Kept, window: Any, which: Any) -> Mixed:
            if kept is None:
                return delta_attention(h, p, c, numbers, None)[0], None
            place = place_of(c, "linear_state", layer)
            own = {name: kept[name] for name in kept if name.startswith("linear_")}
            rows = {name: jax.lax.dynamic_index_in_dim(array, place, keepdims=False) for name, array in own.items()}
            mixed, new = delta_attention(h, p, c, numbers, rows)
            return mixed, kept | {
                name: jax.lax.dynamic_update_index_in_dim(array, new[name], place, 0) for name, array in own.items()
            }

        def body(run: Run, number: int | None, carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (x, kept), (p, layer, *of_layer) = carry, inputs
            layer = layer if number is None else number
            p = row_of(p, params, c, run, layer)
            p |= {"adapters": {k: row_of(p["adapters"][k], beside[k], c, run, layer) for k in beside}}
            h = norm(x, p, "attention_norm", c)
            mix = linear_attention if run.config.linear_layers else self_attention
            mixed, kept = mix(h, p, layer, kept, *of_layer)
            after = x + scaled(norm(mixed, p, "attention_post_norm", c), c.residual_scale)
            if "attention_post_norm" not in p:
                after = checkpoint_name(after, SAVED)
            read = h if c.shared_norm else norm(x if c.parallel else after, p, "mlp_norm", c)
            said = mlp(read, p, run.config, self.execution.sort_tokens)
            after = after + scaled(norm(said, p, "mlp_post_norm", c), c.residual_scale)
            return (spread(after), kept), None

        def one(run: Run, number: int | None = None) -> Callable[[tuple, tuple], tuple[tuple, None]]:
            # Kept, the products of all experts would stand there for every token.
            policy = None if self.execution.remat or run.config.num_experts else KEPT
            return jax.checkpoint(functools.partial(body, run, number), policy=policy)

        def once(period: Period, carry: tuple, inputs: list[tuple]) -> tuple[tuple, None]:
            for run, own in zip(period.runs, inputs, strict=True):
                carry, _ = jax.lax.scan(one(run), carry, own)
            return carry, None

        def written_out(period: Period, carry: tuple, inputs: list[tuple]) -> tuple:
            for time, (run, own) in itertools.product(range(period.times), zip(period.runs, inputs, strict=True)):
                for place, layer in enumerate(range(run.first, run.end)):
                    of_layer = jax.tree.map(lambda array, at=(time, place): array[at], own)
                    carry, _ = one(run, layer + time * period.length)(carry, of_layer)
            return carry

        params, beside = nnx.to_pure_dict(nnx.state(self.layers, nnx.Param)), adapters or {}
        carry = (spread(x), None if cache is None else cache.kept)
        for period in periods(c):
            of_runs = by_run(params, c, period)
            besides = {kind: by_run(matrices, c, period) for kind, matrices in beside.items()}
            inputs = []
            for number, run in enumerate(period.runs):
                layers = run.first + np.arange(period.times)[:, None] * period.length + np.arange(run.end - run.first)
                inputs.append(
                    (
                        of_runs[number] | {"adapters": {kind: own[number] for kind, own in besides.items()}},
                        jnp.asarray(layers),
                        jnp.asarray(np.asarray(c.windows)[layers], jnp.int32),
                        None if len(ropes) < 2 else jnp.asarray(np.asarray(c.layer_ropes)[layers], jnp.int32),
                    )
                )
            if self.execution.unroll:
                carry = written_out(period, carry, inputs)
            elif period.times == 1:
                carry, _ = once(period, carry, jax.tree.map(lambda array: array[0], inputs))
            else:
                carry, _ = jax.lax.scan(functools.partial(once, period), carry, inputs)
        x, kept = carry
        last = {name: getattr(self, name)[...] for name in ("final_norm", "final_norm_bias") if hasattr(self, name)}
        x = norm(x, last, "final_norm", c)
        return x, None if kept is None else Cache(kept, segments, places, filled + length)


def branched(cache: Cache) -> Cache:
    """The cache of rows of one segment each as the trunk of those that follow, which do not see one another."""
    return cache._replace(segments=jnp.where(cache.segments > 0, TRUNK, 0))


def of_layers(stacked: Mapping[str, Any], config: DecoderConfig, first: int, end: int) -> dict[str, Any]:
    """Of what is stacked over the layers that have it, that of the layers from `first` up to `end`.

    Args:
      stacked: parameter, or the matrix that it stands beside -> arrays.
    """
    found = {}
    for name, arrays in stacked.items():
        having = layers_with(config, name)
        places = [place for place, layer in enumerate(having) if first <= layer < end]
        if places and len(places) == len(having):
            found[name] = arrays
        elif places:
            found[name] = jax.tree.map(lambda array, a=places[0], b=places[-1]: array[a : b + 1], arrays)
    return found


def by_run(stacked: Mapping[str, Any], config: DecoderConfig, period: Period) -> list[dict[str, Any]]:
    """What each run of a period has of `stacked`, as `of_layers` takes it: [times, layers, ...]."""
    first = period.runs[0].first
    whole = of_layers(stacked, config, first, first + period.times * period.length)
    having = {name: [n for n in layers_with(config, name) if first <= n < first + period.length] for name in whole}

    def of_run(arrays: Any, layers: list[int], run: Run) -> Any:
        start, shape = layers.index(run.first), (period.times, len(layers))
        part = slice(start, start + run.end - run.first)
        return jax.tree.map(lambda array: array.reshape(*shape, *array.shape[1:])[:, part], arrays)

    return [
        {name: of_run(whole[name], layers, run) for name, layers in having.items() if run.first in layers}
        for run in period.runs
    ]


def place_of(config: DecoderConfig, name: str, layer: Layer) -> Layer:
    """Where in a stack a layer stands that has a part in it."""
    having = layers_with(config, name)
    if isinstance(layer, int):
        return having.index(layer)
    if len(having) == config.num_layers:
        return layer
    return jnp.asarray(np.searchsorted(having, np.arange(config.num_layers)))[layer]


def row_of(cut: dict[str, Any], stacked: Mapping[str, Any], config: DecoderConfig, run: Run, layer: Layer) -> dict:
    """A layer's rows of what `by_run` has cut for its run, read where they stood before."""
    found = dict(cut)
    for name in cut.keys() & stacked.keys():
        if isinstance(layer, int) or len(layers_with(config, name)) > run.end - run.first:
            place = place_of(config, name, layer)
            found[name] = jax.tree.map(functools.partial(_row, place), cut[name], stacked[name])
    return found


def _row(place: Layer, row: jax.Array, stack: jax.Array) -> jax.Array:
    return _instead(row, jax.lax.dynamic_index_in_dim(jax.lax.stop_gradient(stack), place, keepdims=False))


@jax.custom_vjp
def _instead(row: jax.Array, read: jax.Array) -> jax.Array:
    """Returns `read`, the same numbers as `row`, read where they stood before: a part of a stack that a scan goes
    through, or that the backward pass is to find again, would be copied first. The gradient is `row`'s, which a scan
    gathers; the stack's it would sum layer by layer.
    """
    return read


_instead.defvjp(lambda row, read: (read, None), lambda _, gradient: (gradient, None))


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x * factor, in x's dtype."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def query_growth(config: DecoderConfig, positions: jax.Array) -> jax.Array | None:
    """[B, T] int32 positions -> the factor on their queries, [B, T, 1, 1] float32; None where it is 1 everywhere."""
    if not config.query_growth:
        return None
    periods = (positions // config.query_period).astype(jnp.float32)
    return (1 + config.query_growth * jnp.log(1 + periods))[..., None, None]


def rope_tables(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T] int32 positions -> cos and sin, [B, T, 1, R/2] float32, R the rotated part of a head."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return (cos, sin) if rope.scale == 1 else (cos * rope.scale, sin * rope.scale)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotary embedding: [B, T, heads, C] with float32 cos, sin [B, T, 1, R/2]; C - R numbers stay.

    What is rotated together stands R/2 apart, or side by side where `interleaved`.
    """
    width = 2 * cos.shape[-1]
    part = x[..., :width].astype(jnp.float32)
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else jnp.split(part, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.stack(turned, axis=-1).reshape(part.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if width == x.shape[-1] else jnp.concatenate([rotated, x[..., width:]], axis=-1)
