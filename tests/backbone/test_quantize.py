"""Quantised weights against qwix, and that the decoder computes with them as if they stood there in full."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from helpers import (
    assert_close,
    hf_config,
    hf_model,
    load_backbone,
    logits,
    mesh_of,
    prefix_model,
    random_batch,
    random_tokens,
    whole_rows,
)
from qwix._src.core.numerics import get_nf4_buckets

from e2p_jax.backbone.convert import convert
from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import parse_config
from e2p_jax.backbone.layout import Execution
from e2p_jax.backbone.quantize import KINDS, NF4_LEVELS, Kind, dequantize, multiply, quantize
from e2p_jax.backbone.weights import abstract, load, matrices, parameters, quantize_layers
from e2p_jax.config import TrainConfig
from e2p_jax.parallel.mesh import param_sharding
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.train.optimizer import make_optimizer
from e2p_jax.train.partition import split, trainable_mask
from e2p_jax.train.step import TrainState, make_train_step

TOKENS = random_tokens(4, 20)


def test_levels_of_nf4() -> None:
    np.testing.assert_allclose(NF4_LEVELS, get_nf4_buckets(), atol=1e-6)


@pytest.mark.parametrize("width", [128, 96, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_as_qwix(kind: Kind, width: int) -> None:
    """Rows of different scales, one of zeros; blocks of 64, 32 and 2."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 8, width)) * rng.lognormal(0, 3, (3, 8, 1))
    weight[1, 2] = 0
    weight = jnp.asarray(weight, jnp.float32)
    stored = quantize(weight, kind)
    ours = dequantize(stored[f"_{kind}"], stored["_scale"], kind, jnp.dtype("float32"))
    tiles = {} if kind == "int8" else {"tiled_axes": {2: np.gcd(64, width)}}
    theirs = qwix.quantize(weight, kind, channelwise_axes=(0, 1), **tiles)
    np.testing.assert_allclose(ours, qwix.dequantize(theirs), rtol=1e-6)
    assert ours[1, 2].tolist() == [0] * width
    assert stored[f"_{kind}"].shape == (3, 8, width if kind == "int8" else width // 2)
    assert stored[f"_{kind}"].dtype == (jnp.int8 if kind == "int8" else jnp.uint8)


def read(directory: Path, kind: Kind, **axes: int) -> Decoder:
    mesh = mesh_of(**axes)
    return load(
        directory,
        dtype=jnp.dtype("float32"),
        sharding=lambda path, shape: param_sharding(mesh, path, shape),
        quantization=kind,
    )


@functools.partial(jax.jit, static_argnums=1)
def to_and_fro(weight: jax.Array, kind: Kind) -> jax.Array:
    stored = quantize(weight, kind)
    return dequantize(stored[f"_{kind}"], stored["_scale"], kind, jnp.dtype("float32"))


def rounded(decoder: Decoder, kind: Kind) -> Decoder:
    """The decoder with full matrices that hold quantised values."""
    for path in matrices(decoder.config):
        variable = getattr(decoder.layers, path.removeprefix("layers/"))
        variable.set_value(to_and_fro(variable[...], kind))
    return decoder


@pytest.mark.parametrize(
    ("family", "kind"), [("phi3", "int4"), ("gpt2", "nf4"), ("deepseek_v3", "nf4"), ("qwen3_5_text", "int8")]
)
def test_a_quantised_decoder_is_one_with_rounded_weights(tmp_path: Path, family: str, kind: Kind) -> None:
    """Fused and transposed tensors, layers of several kinds, latents; whole on four devices, with a cache on one."""
    hf_model(hf_config(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 2})).save_pretrained(tmp_path)
    one, four = read(tmp_path, kind), read(tmp_path, kind, fsdp=2, tensor=2)
    for path, value in parameters(four).items():
        np.testing.assert_array_equal(value, parameters(one)[path])
    codes = parameters(four)[f"layers/q_{kind}"]
    layers, rows, columns = codes.shape
    assert codes.addressable_shards[0].data.shape == (layers, rows // 2, columns // 2)
    assert not parameters(one).keys() & set(matrices(one.config))

    inputs, exact, expected = whole_rows(TOKENS), load_backbone(tmp_path), rounded(load_backbone(tmp_path), kind)
    for path in matrices(exact.config):
        full, coarse = (np.asarray(parameters(decoder)[path]) for decoder in (exact, expected))
        assert np.abs(coarse - full).max() > 1e-3 * np.abs(full).max()
    reference = logits(expected, *inputs)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2)):
        assert_close(logits(four, *inputs), reference, 1e-5)

    @nnx.jit
    def cached(decoder: Decoder) -> jax.Array:
        cache, out = decoder.empty_cache(4, 20), []
        for start, end in [(0, 12), (12, 13)]:
            tokens, positions, segments = (x[:, start:end] for x in inputs)
            hidden, cache = decoder(decoder.embed(tokens), positions, segments, cache)
            out.append(decoder.logits(hidden))
        return jnp.concatenate(out, axis=1)

    assert_close(cached(one), reference[:, :13], 1e-5)


def test_a_row_of_int8_is_scaled_when_it_is_summed() -> None:
    """No matrix of weights is worked out: codes are read into the product."""
    stored = {f"w{name}": part for name, part in quantize(jnp.ones((8, 64)), "int8").items()}
    text = str(jax.make_jaxpr(lambda x: multiply(x, stored, "w"))(jnp.ones((2, 64), jnp.bfloat16)))
    assert "bf16[8,64]" in text and "f32[8,64]" not in text


def test_both_forms_of_a_model_quantise_alike(tmp_path: Path) -> None:
    hf_model(hf_config()).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "flax", "hf", None)
    hf, flax = (parameters(read(tmp_path / form, "nf4", fsdp=4)) for form in ("hf", "flax"))
    assert hf.keys() == flax.keys() == parameters(abstract_decoder("nf4")).keys()
    for path, value in hf.items():
        np.testing.assert_array_equal(flax[path], value)


def abstract_decoder(kind: Kind) -> Decoder:
    config = parse_config(hf_config().to_dict(), Path("config.json"))
    return abstract(config, dtype=jnp.dtype("float32"), quantization=kind)


SIZES = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
LAYER_BYTES = 4 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 256 * 512)


def train_step(model: PrefixModel) -> tuple[Any, Any]:
    """Of a projector, not yet compiled; and its arguments."""
    graph, state = nnx.split(model)
    params, mask = nnx.to_pure_dict(state), trainable_mask(model, ("projector/**",))
    config = TrainConfig(warmup_steps=0)
    trainable, frozen = split(params, mask)
    optimizer = make_optimizer(config, mask, params)
    step = make_train_step(graph, mask, optimizer, optax.constant_schedule(1e-2), 1)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), jax.random.key(0))
    return jax.jit(step), (state, frozen, random_batch(rows=1))


@pytest.mark.parametrize(("kind", "remat"), [("int8", True), ("nf4", False)])
def test_no_full_copy_of_the_model_exists(kind: Kind, remat: bool) -> None:
    """Neither among the step's arguments nor in its temporary memory, and its update is that of rounded weights.

    Beside the step with full weights it needs less than two layers' matrices more, where all would be eight.
    """
    full, model = (prefix_model(execution=Execution(remat=remat), **SIZES) for _ in range(2))
    quantize_layers(model.backbone, kind)
    rounded(full.backbone, kind)
    (step, arguments), (its_step, its_arguments) = train_step(model), train_step(full)
    quantised, exact = step.lower(*arguments).compile(), its_step.lower(*its_arguments).compile()
    more, less = quantised.memory_analysis(), exact.memory_analysis()
    assert more.temp_size_in_bytes - less.temp_size_in_bytes < 2 * LAYER_BYTES
    share = {"int8": 1 / 4, "nf4": 1 / 8}[kind] + 1 / 64  # and the scales
    assert less.argument_size_in_bytes - more.argument_size_in_bytes >= 8 * LAYER_BYTES * (1 - share)

    (_, metrics), (_, expected) = quantised(*arguments), exact(*its_arguments)
    assert_close(metrics.loss, expected.loss, 1e-5)
    assert_close(metrics.grad_norm, expected.grad_norm, 1e-4)
