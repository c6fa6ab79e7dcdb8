"""The projector of kind `mlp`: two layers with SiLU, a linear residual and dropout, that the field settled on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from e2p_jax.config import ProjectorConfig, ProjectorKind
from e2p_jax.config_fields import POSITIVE, SHARE, result
from e2p_jax.prefix import linear

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


@dataclasses.dataclass(frozen=True)
class Settings(ProjectorConfig):
    """User vector -> soft tokens, by two layers beside a matrix."""

    kind: ProjectorKind = result("mlp")
    """One of `registry.PROJECTORS`."""
    hidden_size: int = result(512, POSITIVE)
    """With mlp: width of the hidden layer."""
    dropout: float = result(0.05, SHARE)
    """With mlp: share of the hidden layer's values dropped in training."""


def parameters(rows: int, columns: int, settings: Settings, normal: Any, zeros: Any) -> dict[str, Any]:
    """Those of `linear`, `up` [E, H], `up_bias` [H] and `down` [H, K*D]."""
    hidden = settings.hidden_size
    return {
        **linear.parameters(rows, columns, settings, normal, zeros, _SHARE),
        "up": rows**-0.5 * normal(rows, hidden),
        "up_bias": zeros(hidden),
        "down": _SHARE * 0.356**-0.5 * hidden**-0.5 * normal(hidden, columns),
    }


def begin(parameters: Mapping[str, Any], fitted: Any) -> dict[str, Any]:
    """The fresh parameters made into the map that `fitted` gives, to which the hidden layer adds nothing yet."""
    return linear.begin(parameters, fitted) | {"down": 0 * parameters["down"]}


def project(projector: Any, x: Any, dropout_key: Any) -> Any:
    """[..., E] -> [..., K*D]."""
    return layers(projector, x, dropout_key) + projector.row("bias", x)


def layers(projector: Any, x: Any, dropout_key: Any) -> Any:
    """`project` less the bias."""
    import jax
    import jax.numpy as jnp

    from e2p_jax.products import einsum

    h = jax.nn.silu(einsum("...i,io->...o", x, projector.up[...]) + projector.row("up_bias", x))
    if dropout_key is not None and (rate := projector.settings.dropout):
        h = jnp.where(jax.random.bernoulli(dropout_key, 1 - rate, h.shape), h / (1 - rate), 0.0)
    return einsum("...i,io->...o", x, projector.skip[...]) + einsum("...i,io->...o", h, projector.down[...])


def project_numpy(p: Mapping[str, Any], x: Any) -> Any:
    """The same of [N, E] in NumPy, from the parameters by name."""
    return layers_numpy(p, x) + p["bias"]


def layers_numpy(p: Mapping[str, Any], x: Any) -> Any:
    """`layers` of [N, E] in NumPy."""
    import numpy as np

    h = x @ p["up"] + p["up_bias"]
    return x @ p["skip"] + (h / (1 + np.exp(-h))) @ p["down"]
