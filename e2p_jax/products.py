"""Products of arrays, in the precision that their dtype names."""

import jax
import jax.numpy as jnp


def einsum(equation: str, left: jax.Array, right: jax.Array, out: jnp.dtype | None = None) -> jax.Array:
    """`jnp.einsum` of two arrays in which float32 is float32: by default a TPU multiplies it in bfloat16, and NVIDIA's
    libraries may in TF32. On bfloat16, whose products are exact, nothing changes.

    Args:
      out: dtype of the sums and the result; None is the operands' own.
    """
    full = left.dtype == right.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if full else None
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=out)
