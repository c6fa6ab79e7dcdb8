"""A projector: tanh of one matrix, times a width that is learned."""

import dataclasses
from typing import Any

from e2p_jax.config import ProjectorConfig, ProjectorKind
from e2p_jax.config_fields import POSITIVE, result

TORCH_NAMES = {"matrix": "matrix.weight"}
TORCH = """\
class Bounded(E2PProjector):
    def make_layers(self, config, rows, columns):
        self.matrix = nn.Linear(rows, columns, bias=False)
        self.width = nn.Parameter(torch.ones(columns))
        self.power = config.projector_power

    def apply_layers(self, x):
        return self.width * self.matrix(x).tanh() ** self.power


PROJECTORS["bounded"] = Bounded
"""


@dataclasses.dataclass(frozen=True)
class Settings(ProjectorConfig):
    kind: ProjectorKind = result("bounded")
    """One of `registry.PROJECTORS`."""
    power: int = result(1, POSITIVE)
    """With bounded: of the tanh."""


def parameters(rows: int, columns: int, settings: Settings, normal: Any, zeros: Any) -> dict[str, Any]:
    return {"matrix": rows**-0.5 * normal(rows, columns), "width": 1 + zeros(columns)}


def project(projector: Any, x: Any, dropout_key: Any) -> Any:
    import jax.numpy as jnp

    from e2p_jax.products import einsum

    y = jnp.tanh(einsum("...i,io->...o", x, projector.matrix[...])) ** projector.settings.power
    return y * projector.row("width", y)
