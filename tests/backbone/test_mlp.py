"""Experts: tokens sorted to them give what all experts on all tokens give, for what the chosen ones cost."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import SIZES, assert_close, hf_config, hf_model, mesh_of
from jax.sharding import Mesh

from e2p_jax.backbone.families import parse_config
from e2p_jax.backbone.layout import DecoderConfig, layer_shapes
from e2p_jax.backbone.mlp import mlp, route
from e2p_jax.backbone.quantize import quantize
from e2p_jax.parallel.mesh import param_sharding, row_sharding
from e2p_jax.plan.hlo import Program

MIXTRAL = parse_config(
    {**SIZES, "model_type": "mixtral", "rms_norm_eps": 1e-5, "num_local_experts": 16}, Path("config.json")
)
GPT_OSS = parse_config(
    {**SIZES, "model_type": "gpt_oss", "rms_norm_eps": 1e-5, "num_local_experts": 16, "swiglu_limit": 0.5},
    Path("config.json"),
)


def layer(config: DecoderConfig) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in layer_shapes(config).items() if name.startswith(("expert", "router"))}
    return {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def placed(params: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """A stack of that one layer, split as the decoder's is."""
    stacks = {name: value[None] for name, value in params.items()}
    return {n: jax.device_put(v, param_sharding(mesh, f"backbone/layers/{n}", v.shape)) for n, v in stacks.items()}


@pytest.mark.parametrize(
    ("config", "rows", "length", "mesh"),
    [(MIXTRAL, 1, 1, {}), (GPT_OSS, 4, 24, {"data": 4}), (GPT_OSS, 4, 24, {"fsdp": 2, "tensor": 2})],
    ids=lambda x: x.naming if isinstance(x, DecoderConfig) else str(x),
)
def test_sorted_tokens_give_what_all_experts_give(
    config: DecoderConfig, rows: int, length: int, mesh: dict[str, int]
) -> None:
    """Values, and gradients by the tokens and by the router; one token makes fewer choices than there are experts."""
    params = layer(config)
    params |= {f"expert_up{form}": value for form, value in quantize(params.pop("expert_up"), "int8").items()}
    experts, router = placed(params, mesh_of(**mesh)), params.pop("router")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, length, config.hidden_size)), jnp.float32)

    def outcome(sort: bool) -> Any:
        def loss(x: jax.Array, router: jax.Array, experts: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            said = mlp(x, {name: value[0] for name, value in experts.items()} | {"router": router}, config, sort)
            return jnp.sum(jnp.sin(said)), said

        with jax.set_mesh(mesh_of(**mesh)):
            return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, router, experts)

    jax.tree.map(lambda ours, plain: assert_close(ours, plain, 1e-5), outcome(True), outcome(False))


# What keys of `config.json` say of how experts are chosen, of families whose routers have a module of their own.
ROUTERS: dict[str, list[dict[str, Any]]] = {
    "glm4_moe": [
        {},
        {"topk_group": 3},
        {"routed_scaling_factor": 1.0},
        {"norm_topk_prob": False},
        *({"topk_group": 1, "num_experts_per_tok": 2, "n_group": groups} for groups in (3, 2)),
    ],
    "deepseek_v2": [{}, {"topk_method": "greedy"}, {"topk_group": 1, "num_experts_per_tok": 2}],
    "deepseek_v3": [{}, {"topk_group": 1}, {"norm_topk_prob": False}],
}


@pytest.mark.parametrize("family", ROUTERS)
def test_experts_are_chosen_as_transformers_chooses_them(family: str) -> None:
    """And each key changes which, or their weights."""
    x, seen = np.random.default_rng(0).normal(size=(1, 40, SIZES["hidden_size"])).astype(np.float32), []
    for changes in ROUTERS[family]:
        theirs = hf_model(hf_config(family, **changes))
        gate, config = theirs.model.layers[1].mlp.gate, parse_config(theirs.config.to_dict(), Path("config.json"))
        with torch.no_grad():
            _, weights, chosen = gate(torch.tensor(x))
        expected = torch.zeros(40, config.num_experts).scatter(1, chosen, weights).numpy()
        params = {"router": jnp.asarray(gate.weight.detach().numpy())}
        if config.router == "sigmoid":
            params["router_choice_bias"] = jnp.asarray(gate.e_score_correction_bias.numpy())
        ours, places = route(jnp.asarray(x), params, config)
        said = np.zeros((40, config.num_experts), np.float32)
        np.put_along_axis(said, np.asarray(places[0]), np.asarray(ours[0]), axis=1)
        assert_close(said, expected, 1e-5)
        assert all(np.abs(said - other).max() > 1e-3 for other in seen)
        seen.append(said)


def test_a_mixture_costs_what_its_active_experts_cost() -> None:
    """Products of the compiled program: near those of two of sixteen experts, where the tokens are sorted."""
    config = dataclasses.replace(MIXTRAL, hidden_size=64, intermediate_size=128)
    params, x = layer(config), jnp.zeros((4, 512, 64))

    def flops(sort: bool, mesh: Mesh) -> float:
        def said(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
            return mlp(x, {name: value[0] for name, value in params.items()}, config, sort)

        with jax.set_mesh(mesh):
            rows = jax.device_put(x, row_sharding(mesh))
            return Program(jax.jit(said).lower(rows, placed(params, mesh)).compile().as_text()).flops

    needed = 2 * x.size * config.experts_per_token * 3 * config.intermediate_size
    assert flops(False, mesh_of()) > 7.9 * needed
    assert flops(True, mesh_of()) < 1.6 * needed
    assert flops(True, mesh_of(fsdp=4)) < 1.6 * needed / 4
