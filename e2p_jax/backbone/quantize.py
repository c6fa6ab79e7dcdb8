"""Weight-only quantisation: a layer's matrix `q` is stored as `q_int8`, `q_int4` or `q_nf4`, and `q_scale`.

int8 has a scale for each output (row), the others one for each block of 64 inputs. Kept code rather than qwix, which
the tests hold it against: qwix stores four bits as `int4`, which XLA on CPU unpacks for all layers before their scan.
"""

import functools
import math
from statistics import NormalDist
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from e2p_jax.products import einsum

Kind = Literal["int8", "int4", "nf4"]
Quantization = Literal["none", "int8", "int4", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "int4", "nf4")

BLOCK = 64  # inputs that share a scale: QLoRA's

# What the largest weight of a row or block becomes: half a step beyond the last integer, whose step is then whole.
_BOUNDS = {"int8": 127.5, "int4": 7.5, "nf4": 1.0}


def _nf4_levels() -> np.ndarray:
    """[16] float32, ascending: quantiles of the normal distribution that 4-bit codes stand for, with an exact 0
    (Dettmers et al., arXiv 2305.14314, section 3 and appendix E).
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(0.5, edge, 9)[1:]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    return np.array([*negative, 0.0, *positive], np.float32) / np.float32(positive[-1])


NF4_LEVELS = _nf4_levels()


def quantize(weight: jax.Array, kind: Kind) -> dict[str, jax.Array]:
    """A matrix as it is stored, by suffix of its name.

    Args:
      weight: [..., out, in]; `in` is even for the 4-bit kinds.

    Returns:
      `_int8`: int8 [..., out, in], or `_int4` or `_nf4`: uint8 [..., out, in / 2], two codes a byte; and `_scale`:
      float32 [..., out, in / block].
    """
    *rows, width = weight.shape
    block = width if kind == "int8" else math.gcd(BLOCK, width)
    blocks = weight.astype(jnp.float32).reshape(*rows, width // block, block)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / _BOUNDS[kind]
    scaled = blocks / jnp.where(scale == 0, 1.0, scale)
    if kind == "int8":
        codes = jnp.clip(jnp.round(scaled), -128, 127).astype(jnp.int8)
    else:
        if kind == "int4":
            codes = (jnp.clip(jnp.round(scaled), -8, 7) + 8).astype(jnp.uint8)
        else:
            middles = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
            codes = sum((scaled > middle).astype(jnp.uint8) for middle in middles)
        codes = codes[..., : block // 2] | codes[..., block // 2 :] << 4  # the halves of a block
    return {f"_{kind}": codes.reshape(*rows, -1), "_scale": scale[..., 0]}


def dequantize(codes: jax.Array, scale: jax.Array, kind: Kind, dtype: jnp.dtype) -> jax.Array:
    """[..., out, in] in `dtype`, from what `quantize` returns."""
    codes = codes.reshape(*scale.shape, -1)
    if kind == "int8":
        values = codes.astype(jnp.float32)
    else:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
        values = codes.astype(jnp.float32) - 8 if kind == "int4" else jnp.take(jnp.asarray(NF4_LEVELS), codes, axis=0)
    return (values * scale[..., None]).astype(dtype).reshape(*scale.shape[:-1], -1)


def full(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A layer's or all layers' parameters with the quantised matrices as float32 ones again."""
    stored = {name.removesuffix("_scale") for name in params if name.endswith("_scale")}
    forms = {f"{name}_{kind}": (name, kind) for name in stored for kind in KINDS if f"{name}_{kind}" in params}
    kept = {name: value for name, value in params.items() if name not in forms and not name.endswith("_scale")}
    return kept | {
        name: dequantize(params[form], params[f"{name}_scale"], kind, jnp.dtype("float32"))
        for form, (name, kind) in forms.items()
    }


def multiply(x: jax.Array, params: dict[str, jax.Array], name: str) -> jax.Array:
    """[..., in] -> [..., out]: x @ W.T with the matrix W that is stored under `name`, quantised or not."""
    if name in params:
        return einsum("...i,oi->...o", x, params[name].astype(x.dtype))
    kind = next(kind for kind in KINDS if f"{name}_{kind}" in params)

    # Dequantised again in the backward pass: kept for it, the matrices of all layers would stand there in full.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        if kind != "int8":
            return einsum("...i,oi->...o", x, dequantize(codes, scale, kind, x.dtype))
        # A row has one scale, which may wait for the sum: XLA reads codes into the product, and writes out no weights.
        sums = einsum("...i,oi->...o", x, codes.astype(x.dtype), out=jnp.float32)
        return (sums * jnp.expand_dims(scale[..., 0], tuple(range(x.ndim - 1)))).astype(x.dtype)

    return product(x, params[f"{name}_{kind}"], params[f"{name}_scale"])
