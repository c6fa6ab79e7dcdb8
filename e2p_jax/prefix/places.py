"""States at some places of a row, whose gradient is a gather as well."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def at_places(x: jax.Array, places: jax.Array, real: jax.Array) -> jax.Array:
    """`jnp.take_along_axis` of rows' positions.

    Its own gradient would be a scatter that adds rows one number at a time: 1.4 of an H100's 143 ms a step, where a
    gather takes next to nothing.

    Args:
      x: [B, T, D].
      places: [B, M] int32; real ones of a row differ.
      real: [B, M] bool; what stands at other places has no gradient.

    Returns:
      [B, M, D].
    """
    return jnp.take_along_axis(x, places[..., None], axis=1)


def _forward(x: jax.Array, places: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = x.shape[1]

    def numbers(places: jax.Array, real: jax.Array) -> jax.Array:
        """[T] int32: which of the M stands here; M where none does."""
        count = jnp.arange(places.shape[0], dtype=jnp.int32)
        nobody = jnp.full((length,), places.shape[0], jnp.int32)
        return nobody.at[jnp.where(real, places, length)].set(count, mode="drop")

    return at_places(x, places, real), jax.vmap(numbers)(places, real)


def _backward(numbers: jax.Array, grad: jax.Array) -> tuple[jax.Array, None, None]:
    return jnp.take_along_axis(grad, numbers[..., None], axis=1, mode="fill", fill_value=0), None, None


at_places.defvjp(_forward, _backward)
