"""The projector of kind `mlp`: two layers with SiLU, a linear residual and dropout, that the field settled on."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from e2p_jax.prefix import linear
from e2p_jax.prefix.projector import Matrix, row
from e2p_jax.products import einsum

TORCH_NAMES = {**linear.TORCH_NAMES, "up": "up.weight", "up_bias": "up.bias", "down": "down.weight"}
TORCH = """\
class MLP(E2PProjector):
    def make_layers(self, config, rows, columns):
        self.skip = nn.Linear(rows, columns)
        self.up = nn.Linear(rows, config.projector_hidden_size)
        self.down = nn.Linear(config.projector_hidden_size, columns, bias=False)

    def apply_layers(self, x):
        return self.skip(x) + self.down(nn.functional.silu(self.up(x)))


PROJECTORS["mlp"] = MLP
"""

# Of unit output variance, the residual gets one half and the MLP (SiLU of a unit normal has second moment 0.356) the
# other.
_SHARE = 0.5**0.5


def parameters(rows: int, columns: int, hidden_size: int, matrix: Matrix) -> dict[str, nnx.Param]:
    """Those of `linear`, `up` [E, H], `up_bias` [H] and `down` [H, K*D]."""
    return {
        **linear.parameters(rows, columns, hidden_size, matrix, _SHARE),
        "up": matrix(rows, hidden_size, 1.0),
        "up_bias": nnx.Param(jnp.zeros((hidden_size,))),
        "down": matrix(hidden_size, columns, _SHARE * 0.356**-0.5),
    }


def project(projector: Any, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    """[..., E] -> [..., K*D]."""
    h = jax.nn.silu(einsum("...i,io->...o", x, projector.up[...]) + row(projector.up_bias, x))
    if dropout_key is not None and projector.dropout:
        keep = jax.random.bernoulli(dropout_key, 1 - projector.dropout, h.shape)
        h = jnp.where(keep, h / (1 - projector.dropout), 0.0)
    return linear.project(projector, x, None) + einsum("...i,io->...o", h, projector.down[...])
