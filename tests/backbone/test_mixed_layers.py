"""Dense layers among those with experts: what a parameter's stack holds, what reading a part of it costs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import SIZES, hf_config, hf_model, load_backbone, mesh_of

from e2p_jax.backbone.decoder import Decoder, of_layers, row_of
from e2p_jax.backbone.families import parse_config
from e2p_jax.backbone.layout import Execution, Run, layer_shapes, layers_with, runs
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


def test_a_gradient_reaches_the_rows_that_were_read() -> None:
    """Of stacks that a run has whole, and of those that it has a part of."""
    config = parse_config(hf_config("qwen3_moe", **MIXED).to_dict(), Path("config.json"))
    held = {name: layers_with(config, name) for name in ("q", "gate", "router")}
    stacked = {name: jnp.arange(2.0 * len(layers)).reshape(-1, 2) for name, layers in held.items()}

    def said(stacked: dict[str, jax.Array]) -> jax.Array:
        total = jnp.zeros(())
        for run in runs(config):

            def body(total: jax.Array, inputs: tuple, run: Run = run) -> tuple[jax.Array, None]:
                cut, layer = inputs
                rows = row_of(cut, stacked, config, run, layer)
                return total + sum((layer.astype(jnp.float32) + 1) * jnp.sum(row**2) for row in rows.values()), None

            inputs = of_layers(stacked, config, run.first, run.end), jnp.arange(run.first, run.end)
            total, _ = jax.lax.scan(body, total, inputs)
        return total

    for name, gradient in jax.jit(jax.grad(said))(stacked).items():
        factors = np.array([[layer + 1.0] for layer in held[name]])
        np.testing.assert_array_equal(gradient, 2 * factors * np.asarray(stacked[name]))


def test_a_part_of_a_stack_is_not_copied() -> None:
    """The step of a frozen backbone needs far less memory beside its weights than those of its attention take."""
    values = SIZES | {"model_type": "glm4_moe", "rms_norm_eps": 1e-5, "hidden_size": 512, "num_attention_heads": 32}
    values |= {"num_hidden_layers": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = parse_config(values, Path("config.json"))
    graph, params = nnx.split(abstract(config, dtype=jnp.dtype("float32"), execution=Execution(remat=True)))

    def loss(x: jax.Array, params: nnx.State) -> jax.Array:
        decoder: Decoder = nnx.merge(graph, params)
        return jnp.sum(decoder(x, jnp.arange(4, dtype=jnp.int32)[None], jnp.ones((1, 4), jnp.int32))[0])

    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((1, 4, 512), jnp.float32), params).compile()
    attention = sum(params["layers"][name].get_value().size * 4 for name in "qkvo")
    assert compiled.memory_analysis().temp_size_in_bytes < attention / 2


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


def test_the_bias_that_chooses_experts_is_kept_in_float32(tmp_path: Path) -> None:
    hf_model(hf_config("glm4_moe")).save_pretrained(tmp_path)
    mesh = mesh_of()
    half = load(tmp_path, dtype=jnp.dtype("bfloat16"), sharding=lambda path, shape: param_sharding(mesh, path, shape))
    kept, full = half.layers.router_choice_bias[...], load_backbone(tmp_path).layers.router_choice_bias[...]
    assert (kept.dtype, half.layers.router[...].dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(kept, full)
