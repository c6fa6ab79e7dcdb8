"""An adapter: what a matrix gives, times 1 + s (as IA3; Liu et al., arXiv 2205.05638)."""

import dataclasses
from typing import Any

from e2p_jax.config import AdapterConfig, AdapterKind
from e2p_jax.config_fields import result


@dataclasses.dataclass(frozen=True)
class Settings(AdapterConfig):
    kind: AdapterKind = result("scale")
    """One of `registry.ADAPTERS`; its parameters are `KIND/**`."""
    spread: float = result(0.0)
    """With scale: of the first factors."""


def parameters(rows: int, columns: int, settings: Settings, normal: Any, zeros: Any) -> dict[str, Any]:
    return {"by": settings.spread * normal(rows)}


def adapt(y: Any, x: Any, own: Any) -> Any:
    return y * (1 + own["by"]).astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def merge(matrix: Any, own: Any) -> Any:
    return matrix * (1 + own["by"])[..., None]
