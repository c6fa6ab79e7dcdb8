"""The projector of kind `blocks`: K vectors side by side in the table, and each becomes a soft token by the same `mlp`,
with a bias of its own for each of the K places.

For users known by several texts: `e2p embed --blocks K` puts a sentence into each block.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from e2p_jax.config import ProjectorKind
from e2p_jax.config_fields import result
from e2p_jax.errors import UserError
from e2p_jax.prefix import mlp

TORCH_NAMES = {**mlp.TORCH_NAMES, "bias": "bias"}
TORCH = """\
class Blocks(MLP):
    def make_layers(self, config, rows, columns):
        k = self.num_own_tokens
        super().make_layers(config, rows // k, columns // k)
        self.skip = nn.Linear(rows // k, columns // k, bias=False)
        self.bias = nn.Parameter(torch.zeros(columns))

    def apply_layers(self, x):
        return super().apply_layers(x.unflatten(-1, (self.num_own_tokens, -1))).flatten(-2) + self.bias


PROJECTORS["blocks"] = Blocks
"""


@dataclasses.dataclass(frozen=True)
class Settings(mlp.Settings):
    """User vector -> soft tokens, each from its own part of the vector."""

    kind: ProjectorKind = result("blocks")
    """One of `registry.PROJECTORS`."""


def parameters(rows: int, columns: int, settings: Settings, normal: Any, zeros: Any) -> dict[str, Any]:
    """Those of `mlp` for a vector of E/K numbers and one soft token, but for `bias` [K*D].

    Raises:
      UserError: E is no multiple of K.
    """
    k = settings.own_tokens
    if rows % k:
        raise UserError(
            f"projector.kind blocks: user vectors of {rows} numbers are not {k} vectors side by side "
            f"(projector.num_tokens less projector.shared_tokens); make the table with `e2p embed --blocks {k}`"
        )
    return mlp.parameters(rows // k, columns // k, settings, normal, zeros) | {"bias": zeros(columns)}


def begin(parameters: Mapping[str, Any], fitted: Any) -> dict[str, Any]:
    """The fresh parameters made into one map for all blocks."""
    import numpy as np

    begun = mlp.begin(parameters, fitted)
    return begun | {"bias": np.tile(begun["bias"], len(parameters["bias"]) // len(begun["bias"]))}


def project(projector: Any, x: Any, dropout_key: Any) -> Any:
    """[..., E] -> [..., K*D]."""
    each = mlp.layers(projector, x.reshape(*x.shape[:-1], projector.settings.own_tokens, -1), dropout_key)
    return each.reshape(*x.shape[:-1], -1) + projector.row("bias", x)


def project_numpy(p: Mapping[str, Any], x: Any) -> Any:
    """The same of [N, E] in NumPy, from the parameters by name."""
    return mlp.layers_numpy(p, x.reshape(len(x), -1, len(p["up"]))).reshape(len(x), -1) + p["bias"]
