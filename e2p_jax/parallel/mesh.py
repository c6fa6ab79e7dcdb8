"""The device mesh and the sharding rules.

Axes: `data` replicates the weights, `fsdp` splits them and the rows, `tensor` splits them inside a layer.
Rows of a batch are spread over data x fsdp.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from e2p_jax.config import MeshConfig
from e2p_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# What stands in a quantised matrix's place has its axes.
_FORMS = "(_int8|_int4|_nf4|_scale)?"

# First match wins; every parameter matches. Stacked layer weights are [L, out, in], those of experts [L, X, out, in]:
# an expert is split as a layer's own MLP is, so that every device has a part in every token.
RULES: tuple[tuple[str, P], ...] = (
    (
        rf"backbone/layers/(shared_|linear_)?(q|k|v|q_latent|latent|k_shared|q_gate|gate|up|router|write|decay){_FORMS}",
        P(None, "tensor", "fsdp"),
    ),
    (rf"backbone/layers/(shared_|linear_)?(o|down){_FORMS}", P(None, "fsdp", "tensor")),
    (r"backbone/layers/linear_._taps", P(None, "tensor")),
    (rf"backbone/layers/expert_(gate|up){_FORMS}", P(None, None, "tensor", "fsdp")),
    (rf"backbone/layers/expert_down{_FORMS}", P(None, None, "fsdp", "tensor")),
    (r"backbone/(embedding|head)", P("tensor", "fsdp")),
    (r"items/(learned|said|given)", P("fsdp")),
    (r".*", P()),  # norms, biases, projector
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or those given; one axis of the config may be -1 and takes what is left.

    Of several TPU slices `data` goes over them, so that nothing but gradients is sent between them.

    Raises:
      UserError: an axis is neither positive nor -1, the axes do not multiply to the device count, or `data` does not
        divide by the slices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    count = jax.device_count() if devices is None else len(devices)
    if sizes.count(-1) > 1 or any(size < 1 for size in sizes if size != -1):
        raise UserError("mesh.data, mesh.fsdp and mesh.tensor must be positive; one of them may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if int(np.prod(sizes)) != count:
        axes = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(f"{axes} do not multiply to the {count} devices; set one of them to -1")
    types = (jax.sharding.AxisType.Auto,) * 3
    given = jax.devices() if devices is None else devices
    slices = (
        len({device.slice_index for device in given})
        if hasattr(given[0], "slice_index") and given[0].platform == "tpu"
        else 1
    )
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    if sizes[0] % slices:
        raise UserError(f"mesh.data={sizes[0]} does not divide by the {slices} TPU slices; make it a multiple of them")
    inside = (sizes[0] // slices, *sizes[1:])
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), given), AXES, axis_types=types)


def param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one parameter. An axis that does not divide its dimension leaves it whole."""
    spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, path))
    fitted = [axis if axis and dim % mesh.shape[axis] == 0 else None for axis, dim in zip(spec, shape, strict=False)]
    return NamedSharding(mesh, P(*fitted))


def describe_mesh(mesh: Mesh) -> str:
    """`mesh data=4 fsdp=1 tensor=2`."""
    return "mesh " + " ".join(f"{axis}={mesh.shape[axis]}" for axis in AXES)


def bytes_per_device(tree: Any) -> int:
    """Of arrays on a mesh, on its fullest device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over data x fsdp, the rest whole."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def row_shards() -> int:
    """Parts that rows are split into by the mesh around this code (`jax.set_mesh`); 1 outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in ROWS]))


def shard_rows(x: jax.Array) -> jax.Array:
    """Keeps activations split by row only. Outside a mesh (`jax.set_mesh`) it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(ROWS))


def shard_decoded(x: jax.Array) -> jax.Array:
    """Keeps a decoding step's [B, 1, D] split as the weights are, its rows over `data` alone: what is multiplied stays
    where it lies, and sums are sent, which for one token a row is far less than the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, P("data", None, "fsdp"))


def shard_heads(x: jax.Array) -> jax.Array:
    """Keeps [..., B, T, heads, C] of a cache, or what meets it, split by row over data x fsdp, by head over tensor."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    heads = "tensor" if x.shape[-2] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(x, P(*[None] * (x.ndim - 4), ROWS, None, heads, None))


def on_all(x: jax.Array) -> jax.Array:
    """Gives the array to every device of the mesh around this code, and so to every process."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P())


def on_each_device(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` (q [B, T, H, C], k and v [B, T, G, C], of_rows [B, ...], window [], perhaps by_head [H] ->
    [B, T, H, C]) by each device of the mesh around it for its own rows and heads: what one skips is not the others'
    concern, and nothing is sent. Rows or heads that their axes do not divide stay whole.
    """

    def mapped(
        q: jax.Array, k: jax.Array, v: jax.Array, of_rows: jax.Array, window: jax.Array, *by_head: jax.Array
    ) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return attend(q, k, v, of_rows, window, *by_head)
        tensor = mesh.shape["tensor"]
        rows = _rows_of(q)
        heads = "tensor" if q.shape[2] % tensor == k.shape[2] % tensor == 0 else None
        split = P(*rows, None, heads)
        specs = (split, split, split, rows, P(), *(P(heads) for _ in by_head))
        # Its variance check knows nothing of Pallas calls.
        sharded = jax.shard_map(attend, in_specs=specs, out_specs=split, check_vma=False)
        return sharded(q, k, v, of_rows, window, *by_head)

    return mapped


def by_device(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function` ([B, ...] -> [B, ...]) of the rows that a device has for `on_each_device`, by each device."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(x)
    return jax.shard_map(function, in_specs=_rows_of(x), out_specs=_rows_of(x))(x)


def _rows_of(x: jax.Array) -> P:
    return P(ROWS if x.shape[0] % row_shards() == 0 else None)


def by_rows(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` (weights, arrays [B, ...] -> [B, ...]) by each device of the mesh around it for its own rows. What
    `fsdp` splits of the weights is gathered first; the tensor axis goes on splitting them. Rows that the axes do not
    divide stay together.
    """

    def mapped(weights: Any, *arrays: jax.Array) -> jax.Array:
        if jax.sharding.get_abstract_mesh().empty or row_shards() == 1:
            return function(weights, *arrays)
        split = _rows_of(arrays[0])
        specs = (P(), *(split for _ in arrays))
        sharded = jax.shard_map(function, in_specs=specs, out_specs=split, axis_names=set(ROWS), check_vma=False)
        return sharded(weights, *arrays)

    return mapped


def vocabulary_shards(size: int) -> int:
    """Parts that the rows of a [V, D] head are split into by the mesh around this code; 1 where V does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or size % mesh.shape["tensor"] else mesh.shape["tensor"]


def shard_vocabulary(head: jax.Array) -> jax.Array:
    """Gathers a [V, D] head's columns here, and not in a loop that uses it. Outside a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return head
    return jax.lax.with_sharding_constraint(head, P("tensor" if vocabulary_shards(head.shape[0]) > 1 else None))
