"""The projector of kind `linear`: y = x W + b, of unit variance a dimension when it is fresh."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from e2p_jax.prefix.projector import Matrix, row
from e2p_jax.products import einsum

TORCH_NAMES = {"skip": "skip.weight", "bias": "skip.bias"}
TORCH = """\
class Linear(E2PProjector):
    def make_layers(self, config, rows, columns):
        self.skip = nn.Linear(rows, columns)

    def apply_layers(self, x):
        return self.skip(x)


PROJECTORS["linear"] = Linear
"""


def parameters(rows: int, columns: int, hidden_size: int, matrix: Matrix, gain: float = 1.0) -> dict[str, nnx.Param]:
    """`skip` [E, K*D] and `bias` [K*D].

    Args:
      gain: standard deviation of a fresh output.
    """
    return {"skip": matrix(rows, columns, gain), "bias": nnx.Param(jnp.zeros((columns,)))}


def project(projector: Any, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    """[..., E] -> [..., K*D]."""
    return einsum("...i,io->...o", x, projector.skip[...]) + row(projector.bias, x)
