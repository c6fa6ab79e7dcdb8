"""A layer's MLP: gated or plain, or experts among which a router chooses, perhaps beside one that all tokens share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from e2p_jax.backbone.adapter import kind_of
from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.backbone.quantize import multiply
from e2p_jax.parallel.mesh import by_rows

Params = dict[str, Any]  # arrays by name, and under `adapters` those of each kind

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def mlp(x: jax.Array, params: Params, config: DecoderConfig, sort: bool = False) -> jax.Array:
    """[..., D] -> [..., D]: a layer's MLP, or its experts, each of which is one.

    Args:
      params: of the layer.
      sort: tokens are sorted to their experts, [B, T, D]; see `Execution`.
    """
    if config.num_experts:
        one = dataclasses.replace(config, num_experts=0)
        weights, chosen = route(x, params, config)
        experts = _sorted if sort else _all
        said = experts(x, weights, chosen, _part(params, "expert_"), one, config.num_experts)
        if config.shared_size:
            shared = _part(params, "shared_")
            common = mlp(x, shared, one)
            if "router" in shared:
                common = common * jax.nn.sigmoid(multiply(x, shared, "router"))
            said = said + common
        return said
    activate = ACTIVATIONS[config.activation]
    h = linear(x, params, "up")
    if config.swiglu_limit:
        gate = jnp.minimum(linear(x, params, "gate"), config.swiglu_limit)
        h = jnp.clip(h, -config.swiglu_limit, config.swiglu_limit)
        h = (h + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)
    else:
        h = activate(linear(x, params, "gate")) * h if config.gated else activate(h)
    return linear(h, params, "down")


def _part(params: Params, prefix: str) -> Params:
    """The parameters whose names begin so, and the adapters beside them, under the rest of their names."""
    own = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    adapters = {kind: _part(matrices, prefix) for kind, matrices in params.get("adapters", {}).items()}
    return own | ({"adapters": adapters} if any(adapters.values()) else {})


def route(x: jax.Array, params: Params, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """[..., D] -> each token's experts, [..., k] int32, and their weights, float32: the largest of all.

    Computed in float32, where transformers rounds the scores first.
    """
    c = config
    exact: Params = {name: params[name].astype(jnp.float32) for name in ("router", "router_bias") if name in params}
    scores = linear(x.astype(jnp.float32), exact, "router")
    share = jax.nn.softmax(scores) if c.router == "softmax" else jax.nn.sigmoid(scores)
    liked = share
    if "router_choice_bias" in params:
        liked = share + jnp.expand_dims(params["router_choice_bias"].astype(jnp.float32), tuple(range(x.ndim - 1)))
    if c.groups_per_token < c.expert_groups:
        grouped = liked.reshape(*x.shape[:-1], c.expert_groups, -1)
        groups = _best(jnp.sum(jnp.sort(grouped, axis=-1)[..., -c.group_best :], axis=-1), c.groups_per_token)
        among = jnp.sum(jax.nn.one_hot(groups, c.expert_groups), axis=-2)
        liked = jnp.where(among[..., None] > 0, grouped, -jnp.inf).reshape(liked.shape)
    chosen = _best(liked, c.experts_per_token)
    weights = jnp.sum(jax.nn.one_hot(chosen, c.num_experts) * jnp.expand_dims(share, -2), axis=-1)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True) if c.normalise_topk else weights
    return (weights if c.expert_scale == 1 else weights * c.expert_scale), chosen


def _best(scores: jax.Array, count: int) -> jax.Array:
    """[..., X] -> the places of the largest, best first; `top_k` gathers all rows."""
    return jnp.argsort(scores, axis=-1, descending=True)[..., :count]


def _all(
    x: jax.Array, weights: jax.Array, chosen: jax.Array, experts: Params, one: DecoderConfig, count: int
) -> jax.Array:
    """Every expert works on all tokens, and weights, 0 but for a token's own experts, choose among what they say.

    X / k times the products that are needed; but an expert that is split over devices is gathered once, and its
    gradient is one product.
    """
    each = jnp.sum(jax.nn.one_hot(chosen, count) * weights[..., None], axis=-2)  # [..., X]

    # Worked out again one by one, when the backward pass works out the layer again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total: jax.Array, inputs: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        expert, weight = inputs
        return total + mlp(x, expert, one).astype(jnp.float32) * weight[..., None], None

    total, _ = jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (experts, jnp.moveaxis(each, -1, 0)))
    return total.astype(x.dtype)


def _sorted(
    x: jax.Array, weights: jax.Array, chosen: jax.Array, experts: Params, one: DecoderConfig, count: int
) -> jax.Array:
    """Each device sorts its own tokens to their experts and goes through them in blocks that are one expert's each."""
    run = functools.partial(_blocks, one=one, count=count)
    return by_rows(run)(experts, x, weights, chosen)


def _blocks(
    experts: Params, x: jax.Array, weights: jax.Array, chosen: jax.Array, *, one: DecoderConfig, count: int
) -> jax.Array:
    """`_sorted` on one device.

    There are N k / W + X blocks of W tokens at most, nor more than N k; those left over do nothing of use.
    `jax.lax.ragged_dot` would do as well, but is a kernel on TPU alone: elsewhere it multiplies all sorted tokens by
    all experts, and lays them out in memory X times.
    """
    k, width = chosen.shape[-1], x.shape[-1]
    tokens, wanted = x.reshape(-1, width), chosen.reshape(-1)
    size = _block_size(len(wanted) // count)
    limit = min(-(-len(wanted) // size) + count, len(wanted))
    order = jnp.argsort(wanted)  # of the N k choices
    each = jnp.bincount(wanted, length=count)
    blocks = -(-each // size)
    last_block, last_choice = jnp.cumsum(blocks), jnp.cumsum(each)
    owner = jnp.minimum(jnp.searchsorted(last_block, jnp.arange(limit), side="right"), count - 1)  # [M]
    first = (jnp.arange(limit) - (last_block - blocks)[owner]) * size  # of the expert's choices, in the block
    places = (first + (last_choice - each)[owner])[:, None] + jnp.arange(size)[None]
    filled = (first[:, None] + jnp.arange(size)[None] < each[owner][:, None]) & (
        jnp.arange(limit)[:, None] < last_block[-1]
    )
    choices = jnp.where(filled, order[jnp.minimum(places, len(wanted) - 1)], 0)  # [M, W]
    factors = jnp.where(filled, weights.reshape(-1)[choices], 0.0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        who, choice, factor = inputs
        expert = jax.tree.map(lambda value: jax.lax.dynamic_index_in_dim(value, who, keepdims=False), experts)
        token = choice // k
        said = mlp(tokens[token], expert, one).astype(jnp.float32) * factor[:, None]
        return total.at[token].add(said), None

    total, _ = jax.lax.scan(add, jnp.zeros(tokens.shape, jnp.float32), (owner, choices, factors))
    return total.astype(x.dtype).reshape(x.shape)


def _block_size(share: int) -> int:
    """Of tokens: half an expert's share, so that blocks are mostly full; a power of two from 8 to 256."""
    return max(8, min(256, 1 << (share // 2).bit_length() - 1)) if share > 1 else 8


def linear(x: jax.Array, params: Params, name: str) -> jax.Array:
    """Returns x @ W.T + b with W [out, in], quantised or not; bias `<name>_bias` and adapters as there are."""
    y = multiply(x, params, name)
    for kind, matrices in params.get("adapters", {}).items():
        if name in matrices:
            y = kind_of(kind).adapt(y, x, matrices[name])
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + jnp.expand_dims(bias.astype(x.dtype), tuple(range(y.ndim - 1)))
