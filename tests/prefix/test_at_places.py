"""States at a row's places: `take_along_axis` and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2p_jax.prefix.places import at_places


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_take_along_axis(dtype: str) -> None:
    """In any order of the places; unused ones stand at 0 or at a real one's place, and pull at nothing."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 16, 4)), dtype)
    places = np.stack([rng.permutation(16)[:8] for _ in range(3)]).astype(np.int32)
    real = np.arange(8)[None] < np.array([[8], [5], [0]])
    places[1, 5:], places[2] = places[1, 0], 0
    pull = jnp.where(real[..., None], jnp.asarray(rng.normal(size=(3, 8, 4)), dtype), jnp.zeros((), dtype))
    out, back = jax.vjp(lambda x: at_places(x, places, real), x)
    true_out, true_back = jax.vjp(lambda x: jnp.take_along_axis(x, places[..., None], axis=1), x)
    np.testing.assert_array_equal(out, true_out)
    np.testing.assert_array_equal(back(pull)[0], true_back(pull)[0])
    assert not np.any(np.asarray(back(pull)[0], np.float32)[2])
