"""The adapter of kind `lora`: low-rank matrices (Hu et al., arXiv 2106.09685), a fine-tuning baseline.

Beside a matrix W [out, in] stand `in` A [r, in] and `out` B [out, r], PEFT's `lora_A.weight` and `lora_B.weight`: a
layer computes x @ (W + B A).T, as PEFT does with `lora_alpha` = r. B starts at zero.
"""

import dataclasses
from typing import Any

from e2p_jax.config import AdapterConfig, AdapterKind
from e2p_jax.config_fields import POSITIVE, result


@dataclasses.dataclass(frozen=True)
class Settings(AdapterConfig):
    """Low-rank matrices beside the backbone's."""

    kind: AdapterKind = result("lora")
    """One of `registry.ADAPTERS`; its parameters are `KIND/**`."""
    rank: int = result(8, POSITIVE)
    """With lora: rank of the matrices."""


def parameters(rows: int, columns: int, settings: Settings, normal: Any, zeros: Any) -> dict[str, Any]:
    """A of rows of length about 1, and B."""
    return {"in": normal(settings.rank, columns) * columns**-0.5, "out": zeros(rows, settings.rank)}


def adapt(y: Any, x: Any, own: Any) -> Any:
    """Adds x A.T B.T to y, in x's dtype."""
    from e2p_jax.products import einsum

    low = einsum("...i,ri->...r", x, own["in"].astype(x.dtype))
    return y + einsum("...r,or->...o", low, own["out"].astype(x.dtype))


def merge(matrix: Any, own: Any) -> Any:
    """Adds B A to W."""
    from e2p_jax.products import einsum

    return matrix + einsum("lor,lri->loi", own["out"], own["in"])
