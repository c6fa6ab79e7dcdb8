"""float32 is float32: the products of float32 arrays, as a TPU's and an NVIDIA card's compilers get them."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import FAMILY_SIZES, SIZES, mesh_of

from e2p_jax.backbone import lora
from e2p_jax.backbone.families import parse_config
from e2p_jax.config import BackboneConfig, Config, DataConfig, TrainConfig
from e2p_jax.evaluate.generate import Draws, _decode
from e2p_jax.options import Sampling
from e2p_jax.plan.plan import RowShape, abstract_batch
from e2p_jax.prefix import mlp
from e2p_jax.train.partition import split
from e2p_jax.train.setup import abstract_model, abstract_state, jit_eval_step, jit_train_step

_PRODUCT = re.compile(
    r"dot_general .*?(?:precision = \[(\w+), \w+\].*?)?: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)"
)


def products(step: Any, *arguments: Any, **static: Any) -> list[tuple[str, str, str]]:
    """Operands' dtypes and the precision asked for, of every product in a step lowered for accelerators."""
    lowered = step.trace(*arguments, **static).lower(lowering_platforms=("tpu", "cuda"))
    return [(left, right, precision or "DEFAULT") for precision, left, right in _PRODUCT.findall(lowered.as_text())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_float32_are_at_the_highest_precision(dtype: Any) -> None:
    """Of projector, router, adapters, attention, loss and sums over segments; those of bfloat16 stay as they are."""
    values = {**SIZES, **FAMILY_SIZES["qwen3_moe"], "model_type": "qwen3_moe", "rms_norm_eps": 1e-6}
    values |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    decoder = parse_config(values, Path("config.json"))
    config = Config(
        backbone=BackboneConfig(dtype=dtype),
        adapter=lora.Settings(rank=2),
        data=DataConfig(seq_len=128),
        projector=mlp.Settings(hidden_size=16),
        train=TrainConfig(rows=2, trainable=("projector/**", "lora/**")),
    )
    mesh = mesh_of()
    model = abstract_model(config, decoder, 8, mesh)
    state, (_, frozen) = abstract_state(model, config.train), split(model.params, model.mask)
    batch = abstract_batch(config, RowShape(8, 64, 3), mesh)
    prompts = [jax.ShapeDtypeStruct((2, 64), jnp.int32)] * 3 + [jax.ShapeDtypeStruct((2, 1, 8), jnp.float32)]
    with jax.set_mesh(mesh):
        found = products(jit_train_step(model, config.train), state, frozen, batch)
        found += products(jit_eval_step(model), state.trainable, frozen, batch)
        static = {"graph": model.graph, "new_tokens": 4, "top_k": 2, "stops": (0,), "pad": 0}
        found += products(_decode, model.params, *prompts, Draws.of(Sampling()), **static)
    assert len(found) > 60
    for left, right, precision in found:
        assert (left, right, precision) in (("f32", "f32", "HIGHEST"), ("bf16", "bf16", "DEFAULT"))
    assert {left for left, _, _ in found} == ({"f32"} if dtype == "float32" else {"f32", "bf16"})
