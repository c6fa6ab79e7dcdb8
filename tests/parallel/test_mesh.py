"""Meshes and sharding rules, on four CPU devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import mesh_of, prefix_model
from jax.sharding import PartitionSpec as P

from e2p_jax.config import MeshConfig
from e2p_jax.errors import UserError
from e2p_jax.parallel import mesh as mesh_lib
from e2p_jax.parallel.mesh import make_mesh, param_sharding, replicated, row_sharding, row_shards, shard_rows


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [((-1, 1, 1), (4, 1, 1)), ((1, -1, 2), (1, 2, 2)), ((2, 2, -1), (2, 2, 1)), ((1, 4, 1), (1, 4, 1))],
)
def test_one_axis_takes_what_is_left(axes: tuple[int, int, int], sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(*axes))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((2, 1, 1), r"mesh\.data=2, mesh\.fsdp=1, mesh\.tensor=1 do not multiply to the 4 devices"),
        ((-1, 3, 1), r"mesh\.data=-1, mesh\.fsdp=3, mesh\.tensor=1 do not multiply to the 4 devices"),
        ((-1, 8, 1), "do not multiply to the 4 devices"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 4, 1), "must be positive"),
        ((-1, 0, 1), "must be positive"),
        ((-2, -2, 1), "must be positive"),
    ],
)
def test_impossible_meshes_are_refused(axes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(*axes))


class Chip(NamedTuple):
    """What jax asks of a TPU when it lays out a mesh."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU"


def test_of_several_slices_data_goes_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order the devices come in; a mesh that would gather weights between slices is refused."""
    chips: Any = [Chip(n, n % 2, (n // 2 % 2, n // 4, 0)) for n in range(8)]
    monkeypatch.setattr(mesh_lib, "Mesh", lambda devices, axes, **_: devices)
    devices: Any = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), chips)
    assert devices.shape == (2, 2, 2)
    assert [{chip.slice_index for chip in group.flat} for group in devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh\.data=1 does not divide by the 2 TPU slices; make it a multiple"):
        make_mesh(MeshConfig(data=1, fsdp=8), chips)


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_every_matrix_of_the_backbone_is_split(axes: dict[str, int]) -> None:
    """Each of four devices holds a quarter of it; norms, biases and the projector are whole everywhere."""
    mesh = mesh_of(**axes)
    model = prefix_model(vocab_size=96, attention_bias=True, mlp_bias=True)
    split, whole = set(), set()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, value = "/".join(map(str, path)), variable.get_value()
        part = param_sharding(mesh, name, value.shape).shard_shape(value.shape)
        (split if 4 * np.prod(part) == value.size else whole).add(name)
        assert name in split or part == value.shape, name
    layers = {f"backbone/layers/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert split == layers | {"backbone/embedding", "backbone/head"}
    assert len(whole) == 2 + 1 + 7 + 9  # the layers' norms, the final one, biases, projector


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"data": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_data_replicates_weights(axes: dict[str, int]) -> None:
    shape = (3, 64, 32)
    part = param_sharding(mesh_of(**axes), "backbone/layers/q", shape).shard_shape(shape)
    assert part == (3, 64 // axes.get("tensor", 1), 32 // axes.get("fsdp", 1))


def test_an_axis_that_does_not_divide_leaves_the_dimension_whole() -> None:
    mesh = mesh_of(fsdp=2, tensor=2)
    assert param_sharding(mesh, "backbone/embedding", (97, 32)).spec == P(None, "fsdp")
    assert param_sharding(mesh, "backbone/layers/q", (3, 6, 31)).spec == P(None, "tensor", None)


@pytest.mark.parametrize(
    ("axes", "parts"), [({"data": 4}, 4), ({"fsdp": 4}, 4), ({"data": 2, "fsdp": 2}, 4), ({"fsdp": 2, "tensor": 2}, 2)]
)
def test_rows_are_spread_over_data_and_fsdp(axes: dict[str, int], parts: int) -> None:
    mesh = mesh_of(**axes)
    assert row_sharding(mesh).shard_shape((8, 5)) == (8 // parts, 5)
    assert replicated(mesh).shard_shape((8, 5)) == (8, 5)
    x = jax.device_put(jnp.ones((8, 3, 2)), replicated(mesh))
    with jax.set_mesh(mesh):
        assert row_shards() == parts
        spread = jax.jit(shard_rows)(x)
    assert spread.sharding.shard_shape(spread.shape) == (8 // parts, 3, 2)


def test_outside_of_a_mesh_nothing_is_constrained() -> None:
    x = jnp.ones((3, 2))
    assert row_shards() == 1
    assert shard_rows(x) is x
