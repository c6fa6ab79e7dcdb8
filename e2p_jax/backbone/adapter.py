"""Small parameters beside the matrices of a frozen backbone: what the kinds of adapter (`registry.ADAPTERS`) share."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from e2p_jax.backbone.layout import DecoderConfig, layers_with, matrix_shapes
from e2p_jax.config import AdapterConfig
from e2p_jax.registry import ADAPTERS

Own = Mapping[str, jax.Array]  # one matrix's parameters of an adapter, by name
Adapters = dict[str, dict[str, Own]]  # kind -> matrix -> those
Make = Callable[..., jax.Array]  # (*shape) -> such a float32 array for every layer that has the matrix


class Kind(Protocol):
    """The names that the module of a kind defines. It is light: it imports jax inside its functions."""

    Settings: type[AdapterConfig]
    """Its section of the config, with fields of its own."""

    def parameters(self, rows: int, columns: int, settings: Any, normal: Make, zeros: Make) -> dict[str, jax.Array]:
        """Fresh parameters by name, [L, ...], beside one matrix [rows, columns] = [out, in] of each layer; with them
        the backbone says what it says without. Weight decay reaches those of three axes or more.
        """

    def adapt(self, y: jax.Array, x: jax.Array, own: Own) -> jax.Array:
        """What stands in the place of y = x @ W.T, [..., in] and [..., out]; one layer's parameters, without L."""

    def merge(self, matrix: jax.Array, own: Own) -> jax.Array:
        """W [L, out, in] float32 -> the matrix whose product alone is what `adapt` makes."""


def kind_of(name: str) -> Kind:
    """The module of a kind."""
    kind: Kind = ADAPTERS[name].load()
    return kind


class Adapter(nnx.Module):
    """`<matrix>_<kind>_<parameter>` [L, ...] float32 beside every matrix of the layers but experts and their router."""

    def __init__(self, config: DecoderConfig, settings: AdapterConfig, *, rngs: nnx.Rngs):
        def normal(count: int, *shape: int) -> jax.Array:
            return jax.random.normal(rngs.params(), (count, *shape))

        def zeros(count: int, *shape: int) -> jax.Array:
            return jnp.zeros((count, *shape))

        kind = kind_of(settings.kind)
        for name, shape in matrix_shapes(config).items():
            if len(shape) == 2 and not name.endswith("router"):
                makes = (functools.partial(make, len(layers_with(config, name))) for make in (normal, zeros))
                for part, value in kind.parameters(*shape, settings, *makes).items():
                    setattr(self, f"{name}_{settings.kind}_{part}", nnx.Param(value))


def by_matrix(kind: str, params: Mapping[str, jax.Array]) -> Adapters:
    """An `Adapter`'s parameters as the decoder takes them."""
    found: dict[str, dict[str, jax.Array]] = {}
    for name, value in params.items():
        matrix, _, part = name.partition(f"_{kind}_")
        found.setdefault(matrix, {})[part] = value
    return {kind: dict(found)}


def merge(layers: dict[str, jax.Array], adapters: Adapters) -> dict[str, jax.Array]:
    """The layers' stacked parameters with the adapters merged into their matrices, in float32."""
    merged = dict(layers)
    for kind, matrices in adapters.items():
        for name, own in matrices.items():
            merged[name] = kind_of(kind).merge(merged[name].astype(jnp.float32), own)
    return merged
