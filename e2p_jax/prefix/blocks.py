"""The projector of kind `blocks`: K vectors side by side in the table, and each becomes a soft token by the same `mlp`.

For users known by several texts: `e2p embed --blocks K` puts a sentence into each block.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from e2p_jax.config import ProjectorKind
from e2p_jax.config_fields import result
from e2p_jax.errors import UserError
from e2p_jax.prefix import mlp

TORCH_NAMES = mlp.TORCH_NAMES
TORCH = """\
class Blocks(MLP):
    def make_layers(self, config, rows, columns):
        super().make_layers(config, rows // self.num_soft_tokens, columns // self.num_soft_tokens)

    def apply_layers(self, x):
        return super().apply_layers(x.unflatten(-1, (self.num_soft_tokens, -1))).flatten(-2)


PROJECTORS["blocks"] = Blocks
"""


@dataclasses.dataclass(frozen=True)
class Settings(mlp.Settings):
    """User vector -> soft tokens, each from its own part of the vector."""

    kind: ProjectorKind = result("blocks")
    """One of `registry.PROJECTORS`."""


def parameters(rows: int, columns: int, settings: Settings, normal: Any, zeros: Any) -> dict[str, Any]:
    """Those of `mlp` for a vector of E/K numbers and one soft token.

    Raises:
      UserError: E is no multiple of K.
    """
    k = settings.num_tokens
    if rows % k:
        raise UserError(
            f"projector.kind blocks: user vectors of {rows} numbers are not projector.num_tokens = {k} vectors side by "
            f"side; make the table with `e2p embed --blocks {k}`"
        )
    return mlp.parameters(rows // k, columns // k, settings, normal, zeros)


begin = mlp.begin  # one map for all blocks


def project(projector: Any, x: Any, dropout_key: Any) -> Any:
    """[..., E] -> [..., K*D]."""
    each = mlp.project(projector, x.reshape(*x.shape[:-1], projector.num_tokens, -1), dropout_key)
    return each.reshape(*x.shape[:-1], -1)


def project_numpy(p: Mapping[str, Any], x: Any) -> Any:
    """The same of [N, E] in NumPy, from the parameters by name."""
    return mlp.project_numpy(p, x.reshape(len(x), -1, len(p["up"]))).reshape(len(x), -1)
