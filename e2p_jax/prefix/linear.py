"""The projector of kind `linear`: y = x W + b, of unit variance a dimension when it is fresh."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from e2p_jax.config import ProjectorConfig, ProjectorKind
from e2p_jax.config_fields import result

TORCH_NAMES = {"skip": "skip.weight", "bias": "skip.bias"}
TORCH = """\
class Linear(E2PProjector):
    def make_layers(self, config, rows, columns):
        self.skip = nn.Linear(rows, columns)

    def apply_layers(self, x):
        return self.skip(x)


PROJECTORS["linear"] = Linear
"""


@dataclasses.dataclass(frozen=True)
class Settings(ProjectorConfig):
    """User vector -> soft tokens, by a matrix."""

    kind: ProjectorKind = result("linear")
    """One of `registry.PROJECTORS`."""


def parameters(rows: int, columns: int, settings: Any, normal: Any, zeros: Any, gain: float = 1.0) -> dict[str, Any]:
    """`skip` [E, K*D] and `bias` [K*D].

    Args:
      gain: standard deviation of a fresh output.
    """
    return {"skip": gain * rows**-0.5 * normal(rows, columns), "bias": zeros(columns)}


def begin(parameters: Mapping[str, Any], fitted: Any) -> dict[str, Any]:
    """The fresh parameters made into the map that `fitted` gives."""
    skip, bias = fitted(*parameters["skip"].shape)
    return {**parameters, "skip": skip, "bias": bias}


def project(projector: Any, x: Any, dropout_key: Any) -> Any:
    """[..., E] -> [..., K*D]."""
    from e2p_jax.products import einsum

    return einsum("...i,io->...o", x, projector.skip[...]) + projector.row("bias", x)


def project_numpy(p: Mapping[str, Any], x: Any) -> Any:
    """The same of [N, E] in NumPy, from the parameters by name."""
    return x @ p["skip"] + p["bias"]
