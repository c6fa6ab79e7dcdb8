"""Low-rank adapters beside the layers' matrices (LoRA; Hu et al., arXiv 2106.09685): a fine-tuning baseline."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from e2p_jax.backbone.layout import DecoderConfig, layer_shapes
from e2p_jax.products import einsum

PyTree = Any


class Lora(nnx.Module):
    """For every matrix W [L, out, in]: `<name>_lora_in` A [L, r, in] and `<name>_lora_out` B [L, out, r], in float32.

    A layer computes x @ (W + B A).T: PEFT's with `lora_alpha` = r. B starts at zero: a fresh adapter changes nothing.
    Experts and their router have none.
    """

    def __init__(self, config: DecoderConfig, rank: int, *, rngs: nnx.Rngs):
        layers = config.num_layers
        for name, shape in layer_shapes(config).items():
            if len(shape) == 2 and name != "router":
                start = jax.random.normal(rngs.params(), (layers, rank, shape[1])) * shape[1] ** -0.5
                setattr(self, f"{name}_lora_in", nnx.Param(start))
                setattr(self, f"{name}_lora_out", nnx.Param(jnp.zeros((layers, shape[0], rank))))


def merge(layers: dict[str, jax.Array], adapters: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The layers' stacked parameters with every adapter added to its matrix, in float32."""
    merged = dict(layers)
    for name in layers:
        if f"{name}_lora_out" in adapters:
            change = einsum("lor,lri->loi", adapters[f"{name}_lora_out"], adapters[f"{name}_lora_in"])
            merged[name] = layers[name].astype(jnp.float32) + change
    return merged
