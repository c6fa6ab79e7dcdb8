"""Layers of several kinds, by MLP and by attention: what a parameter's stack holds, what reading a part of it costs."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import SIZES, hf_config, hf_model, load_backbone, mesh_of, random_tokens, whole_rows

from e2p_jax.backbone.decoder import Decoder, by_run, row_of
from e2p_jax.backbone.families import parse_config
from e2p_jax.backbone.layout import Execution, Run, layer_shapes, layers_with, periods, runs
from e2p_jax.backbone.weights import abstract, load
from e2p_jax.embed.hidden_states import _first_layers
from e2p_jax.parallel.mesh import param_sharding

MIXED = {"num_hidden_layers": 5, "mlp_only_layers": [1, 2]}


def test_each_parameter_is_stacked_over_the_layers_that_have_it() -> None:
    config = parse_config(hf_config("qwen3_moe", **MIXED).to_dict(), Path("config.json"))
    assert [(run.first, run.end, run.config.num_experts) for run in runs(config)] == [(0, 1, 6), (1, 3, 0), (3, 5, 6)]
    held = {name: layers_with(config, name) for name in ("q", "gate", "down_int8", "expert_gate", "router", "mlp_norm")}
    assert held["q"] == held["mlp_norm"] == [0, 1, 2, 3, 4]
    assert held["gate"] == held["down_int8"] == [1, 2]
    assert held["expert_gate"] == held["router"] == [0, 3, 4]


HYBRID = {"num_hidden_layers": 11, "full_attention_interval": 3, "layer_types": None}


def test_runs_that_come_again_are_one_period() -> None:
    def found(family: str, **changes: Any) -> list[tuple[int, list[tuple[int, int, bool, bool]]]]:
        config = parse_config(hf_config(family, **changes).to_dict(), Path("config.json"))
        return [
            (p.times, [(r.first, r.end, bool(r.config.linear_layers), bool(r.config.num_experts)) for r in p.runs])
            for p in periods(config)
        ]

    assert found("llama") == [(1, [(0, 3, False, False)])]
    assert found("glm4_moe") == [(1, [(0, 1, False, False)]), (1, [(1, 3, False, True)])]
    linear, full = (0, 2, True, False), (2, 3, False, False)
    assert found("qwen3_5_text", **HYBRID) == [(3, [linear, full]), (1, [(9, 11, True, False)])]
    dense = {"mlp_only_layers": [0], "num_experts": 6}
    (first, *again) = found("qwen3_next", **HYBRID, **dense)
    assert first == (1, [(0, 1, True, False)])
    assert again == [(1, [(1, 2, True, True)]), (3, [(2, 3, False, True), (3, 5, True, True)])]


@pytest.mark.parametrize(("family", "changes"), [("qwen3_moe", MIXED), ("qwen3_5_text", HYBRID)], ids=["once", "again"])
def test_a_gradient_reaches_the_rows_that_were_read(family: str, changes: dict[str, Any]) -> None:
    """Of stacks that a run has whole, and of those that it has a part of."""
    config = parse_config(hf_config(family, **changes).to_dict(), Path("config.json"))
    held = {name: layers_with(config, name) for name in ("q", "gate", "router", "linear_q", "mlp_norm")}
    stacked = {name: jnp.arange(2.0 * len(layers)).reshape(-1, 2) for name, layers in held.items() if layers}

    def said(stacked: dict[str, jax.Array]) -> jax.Array:
        def body(run: Run, total: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
            cut, layer = inputs
            rows = row_of(cut, stacked, config, run, layer)
            return total + sum((layer.astype(jnp.float32) + 1) * jnp.sum(row**2) for row in rows.values()), None

        total = jnp.zeros(())
        for period in periods(config):
            for time in range(period.times):
                for run, cut in zip(period.runs, by_run(stacked, config, period), strict=True):
                    layers = jnp.arange(run.first, run.end) + time * period.length
                    own = jax.tree.map(lambda array, time=time: array[time], cut)
                    total, _ = jax.lax.scan(functools.partial(body, run), total, (own, layers))
        return total

    for name, gradient in jax.jit(jax.grad(said))(stacked).items():
        factors = np.array([[layer + 1.0] for layer in held[name]])
        np.testing.assert_array_equal(gradient, 2 * factors * np.asarray(stacked[name]))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen3_moe", MIXED), ("qwen3_5_text", HYBRID | {"num_hidden_layers": 5, "full_attention_interval": 2})],
    ids=["once", "again"],
)
def test_layers_written_out_compute_what_a_loop_computes(family: str, changes: dict[str, Any]) -> None:
    """Its values, its gradient, and what generation takes: the last position with the others in a cache."""
    config = parse_config(hf_config(family, **changes).to_dict(), Path("config.json"))
    tokens, positions, segments = whole_rows(random_tokens(1, 8))

    def value_and_gradient(unroll: bool) -> Any:
        graph, state = nnx.split(abstract(config, dtype=jnp.dtype("float32"), execution=Execution(unroll=unroll)))
        rng = np.random.default_rng(1)
        filled = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), state)

        def said(state: nnx.State) -> jax.Array:
            decoder: Decoder = nnx.merge(graph, state)
            return jnp.sum(jnp.sin(decoder(decoder.embed(tokens), positions, segments)[0]))

        def last(state: nnx.State) -> jax.Array:
            decoder: Decoder = nnx.merge(graph, state)
            cache = decoder.empty_cache(1, 8)
            for part in (slice(0, 7), slice(7, 8)):
                x = decoder.embed(tokens[:, part])
                hidden, cache = decoder(x, positions[:, part], segments[:, part], cache)
            return hidden

        return *jax.jit(jax.value_and_grad(said))(filled), jax.jit(last)(filled)

    (loop, gradient, hidden), (other, others, unrolled) = value_and_gradient(False), value_and_gradient(True)
    assert float(other) == pytest.approx(float(loop), rel=1e-5)
    np.testing.assert_allclose(unrolled, hidden, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5_text"])
def test_a_part_of_a_stack_is_not_copied(family: str) -> None:
    """The step of a frozen backbone needs far less memory beside its weights than those of its attention take."""
    values = SIZES | {"model_type": family, "rms_norm_eps": 1e-5, "hidden_size": 512, "num_attention_heads": 32}
    values |= {"num_hidden_layers": 8}
    if family == "glm4_moe":
        values |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    else:
        values |= {"linear_num_key_heads": 2, "linear_num_value_heads": 64, "linear_key_head_dim": 8}
        values |= {"linear_value_head_dim": 8}
    config = parse_config(values, Path("config.json"))
    graph, params = nnx.split(abstract(config, dtype=jnp.dtype("float32"), execution=Execution(remat=True)))

    def loss(x: jax.Array, params: nnx.State) -> jax.Array:
        decoder: Decoder = nnx.merge(graph, params)
        return jnp.sum(decoder(x, jnp.arange(4, dtype=jnp.int32)[None], jnp.ones((1, 4), jnp.int32))[0])

    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((1, 4, 512), jnp.float32), params).compile()
    ours = params["layers"]
    attention = sum(ours[name].get_value().size * 4 for name in (*"qkvo", "linear_v", "linear_o") if name in ours)
    assert compiled.memory_analysis().temp_size_in_bytes < attention / 2


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3_5_text", HYBRID)], ids=["once", "again"])
def test_layers_written_out_keep_no_weights_of_their_own(family: str, changes: dict[str, Any]) -> None:
    """What the backward pass reads behind its barrier is whole stacks: a layer's matrix would be copied out of one."""
    config = parse_config(hf_config(family, **changes).to_dict(), Path("config.json"))
    graph, params = nnx.split(abstract(config, dtype=jnp.dtype("float32"), execution=Execution(unroll=True)))

    def loss(x: jax.Array, params: nnx.State) -> jax.Array:
        decoder: Decoder = nnx.merge(graph, params)
        return jnp.sum(decoder(x, jnp.arange(4, dtype=jnp.int32)[None], jnp.ones((1, 4), jnp.int32))[0])

    program = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((1, 4, 32), jnp.float32), params).as_text()
    read = {
        kind
        for result, types in re.findall(r"(%\d+):\d+ = stablehlo.optimization_barrier .* : (.*)", program)
        for place, kind in enumerate(types.split(", "))
        if re.search(rf"{result}#{place}\b", program)
    }
    count, rows, columns = params["layers"]["gate"].get_value().shape
    assert f"tensor<{count}x{rows}x{columns}xf32>" in read
    assert f"tensor<{rows}x{columns}xf32>" not in read


def test_the_first_layers_alone(tmp_path: Path) -> None:
    """What `e2p embed` reads of a model: its first layers' rows, a dense layer's or that and one with experts."""
    hf_model(hf_config("glm4_moe")).save_pretrained(tmp_path)
    whole = load_backbone(tmp_path).layers
    for depth, dense, experts in ((1, 1, 0), (2, 1, 1)):
        decoder = _first_layers(tmp_path, depth, mesh_of())
        assert [(run.first, run.end) for run in runs(decoder.config)] == [(0, 1), (1, 2)][:depth]
        assert decoder.execution.sort_tokens
        for name, count in (("q", depth), ("gate", dense), ("expert_gate", experts)):
            if count:
                np.testing.assert_array_equal(getattr(decoder.layers, name)[...], getattr(whole, name)[...][:count])
            else:
                assert name not in layer_shapes(decoder.config) or not layers_with(decoder.config, name)


def test_the_first_layers_may_all_be_linear(tmp_path: Path) -> None:
    hf_model(hf_config("qwen3_5_text")).save_pretrained(tmp_path)
    decoder = _first_layers(tmp_path, 1, mesh_of())
    assert layers_with(decoder.config, "linear_q") == [0] and not layers_with(decoder.config, "q")
    tokens, positions, segments = whole_rows(random_tokens(1, 4))
    assert decoder(decoder.embed(tokens), positions, segments)[0].shape == (1, 4, 32)


def test_the_bias_that_chooses_experts_is_kept_in_float32(tmp_path: Path) -> None:
    hf_model(hf_config("glm4_moe")).save_pretrained(tmp_path)
    mesh = mesh_of()
    half = load(tmp_path, dtype=jnp.dtype("bfloat16"), sharding=lambda path, shape: param_sharding(mesh, path, shape))
    kept, full = half.layers.router_choice_bias[...], load_backbone(tmp_path).layers.router_choice_bias[...]
    assert (kept.dtype, half.layers.router[...].dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(kept, full)
