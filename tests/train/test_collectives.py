"""What the compiled train step sends between devices: by name, by shape and in bytes."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from helpers import SIZES, mesh_of

from e2p_jax.backbone.families import DecoderConfig, parse_config
from e2p_jax.config import BackboneConfig, Config, DataConfig, TrainConfig
from e2p_jax.parallel.mesh import bytes_per_device
from e2p_jax.plan.hlo import Collective, Program
from e2p_jax.plan.plan import RowShape, abstract_batch
from e2p_jax.prefix import mlp
from e2p_jax.train.partition import split
from e2p_jax.train.setup import abstract_model, abstract_state, jit_train_step

DECODER = parse_config({**SIZES, "vocab_size": 96, "model_type": "llama", "rms_norm_eps": 1e-5}, Path("config.json"))
MIXTRAL = {**SIZES, "vocab_size": 96, "model_type": "mixtral", "rms_norm_eps": 1e-5}
EXPERTS = parse_config({**MIXTRAL, "num_local_experts": 3, "num_experts_per_tok": 2}, Path("config.json"))
ROWS, LENGTH, TARGETS, SEGMENTS, WIDTH = 8, 256, 40, 7, 11  # of two blocks of attention
CHUNK = 10  # of a row's targets, at a time in the loss
EVERYTHING = ("projector/**", "backbone/**")


class Step(NamedTuple):
    collectives: list[Collective]
    weights: dict[str, tuple[int, ...]]  # of the backbone, whole: of one layer, and without its first axis
    trainable: int  # bytes
    state: int  # bytes a device, without the key's eight
    donated: int  # of them, what the new state is written over
    is_placed: bool  # all lies where the model has it, before and after, though nobody said so to the compiler


@functools.cache
def step(trainable: tuple[str, ...] = ("projector/**",), decoder: DecoderConfig = DECODER, **axes: int) -> Step:
    config = Config(
        backbone=BackboneConfig(remat=True),
        data=DataConfig(seq_len=LENGTH),
        projector=mlp.Settings(hidden_size=24),
        train=TrainConfig(rows=ROWS, trainable=trainable, logits_at_once=CHUNK * ROWS * DECODER.vocab_size // 4),
    )
    mesh = mesh_of(**axes)
    model = abstract_model(config, decoder, WIDTH, mesh)
    state, (_, frozen) = abstract_state(model, config.train), split(model.params, model.mask)
    batch = abstract_batch(config, RowShape(WIDTH, TARGETS, SEGMENTS), mesh)
    with jax.set_mesh(mesh):
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, frozen, batch))
        compiled = jit_train_step(model, config.train).lower(*shapes).compile()
    backbone = model.params["backbone"]
    weights = {name: leaf.shape[1:] for name, leaf in backbone["layers"].items() if leaf.ndim == 3}
    weights |= {name: backbone[name].shape for name in ("embedding", "head")}
    trained = sum(int(np.prod(leaf.shape)) * 4 for leaf in jax.tree.leaves(state.trainable))
    collectives = Program(compiled.as_text()).collectives
    donated = compiled.memory_analysis().alias_size_in_bytes
    taken, given = jax.tree.leaves(compiled.input_shardings[0]), jax.tree.leaves(compiled.output_shardings[0])
    arrays = jax.tree.leaves((state, frozen, batch))
    is_placed = all(
        place.is_equivalent_to(leaf.sharding, leaf.ndim)
        for leaf, place in [*zip(arrays, taken, strict=True), *zip(jax.tree.leaves(state), given, strict=True)]
    )
    return Step(collectives, weights, trained, bytes_per_device(state), donated, is_placed)


def of_kind(collectives: list[Collective], *kinds: str) -> list[Collective]:
    return [c for c in collectives if c.kind in kinds]


MESHES = [{"data": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_gradients_are_summed_once_and_are_those_of_the_trainable_part(axes: dict[str, int]) -> None:
    """Beside them go the loss and the number of targets. The tensor axis sums activations too, of the own rows."""
    collectives, trainable = step(**axes).collectives, step(**axes).trainable
    sums = of_kind(collectives, "all-reduce", "reduce-scatter")
    sums = [c for c in sums if not any(a.shape[:1] == (ROWS // 2,) for a in c.arrays)]
    assert [c.nbytes * c.times for c in sums] == [trainable + 8]
    assert sums[0].group == (2 if "tensor" in axes else 4)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_step_says_where_all_lies(axes: dict[str, int]) -> None:
    assert step(**axes).is_placed


@pytest.mark.parametrize("trainable", [("projector/**",), EVERYTHING], ids=["projector", "everything"])
def test_the_new_state_is_written_over_the_old(trainable: tuple[str, ...]) -> None:
    """So that parameters that train, and AdamW's two moments of them, exist once."""
    taken = step(trainable, fsdp=4)
    assert taken.donated == taken.state + 8


def test_with_replicated_weights_nothing_else_is_sent() -> None:
    assert len(step(data=4).collectives) == 1


def test_fsdp_gathers_weights_and_sends_nothing_else_of_the_backbone() -> None:
    """Each weight forward, and again backward: of recomputed products, and of those for the gradient of their input."""
    collectives, weights, *_ = step(fsdp=4)
    gathers = of_kind(collectives, "all-gather")
    assert len(gathers) + 1 == len(collectives)
    sent: dict[tuple[int, ...], int] = {}
    for gather in gathers:
        (array,) = gather.arrays
        assert array.shape in weights.values(), gather
        assert gather.group == 4
        assert gather.times == (1 if array.shape == weights["head"] else DECODER.num_layers)
        sent[array.shape] = sent.get(array.shape, 0) + 1
    assert sent.pop(weights["head"]) == 2  # embedding and head have one shape; neither goes again for every chunk
    for shape, times in sent.items():
        sharing = sum(shape == other for other in weights.values())
        assert sharing <= times <= 3 * sharing, shape


@pytest.mark.parametrize(("trainable", "at_once"), [(("projector/**",), 3), (EVERYTHING, 1)], ids=["frozen", "trained"])
def test_experts_are_gathered_and_no_token_travels_to_them(trainable: tuple[str, ...], at_once: int) -> None:
    """Nor do its scores. Gate, up and down of a layer's experts at once, of experts that train one after the other;
    forward and backward.
    """
    assert trainable == EVERYTHING or len(step(trainable, EXPERTS, data=4).collectives) == 1
    collectives, weights, *_ = step(trainable, EXPERTS, fsdp=4)
    gathers = of_kind(collectives, "all-gather")
    assert len(gathers) + 1 == len(collectives) or trainable == EVERYTHING
    count, front = (EXPERTS.num_experts // at_once, (at_once,) if at_once > 1 else ())
    wide, narrow = (EXPERTS.intermediate_size, EXPERTS.hidden_size), (EXPERTS.hidden_size, EXPERTS.intermediate_size)
    own = [g.arrays[0].shape for g in gathers if g.arrays[0].shape in ((*front, *wide), (*front, *narrow))]
    assert {g.times for g in gathers if g.arrays[0].shape in own} == {EXPERTS.num_layers * count}
    assert sorted(own) == [(*front, *narrow)] * 2 + [(*front, *wide)] * 4
    assert {a.shape for g in gathers for a in g.arrays} == {*weights.values(), *own}


def test_a_tensor_axis_sums_what_experts_say_of_the_own_rows() -> None:
    """Block by block, as often on every device; each has its part of every expert."""
    collectives, *_ = step(decoder=EXPERTS, fsdp=2, tensor=2)
    gathered = {c.arrays[0].shape for c in of_kind(collectives, "all-gather") if len(c.arrays[0].shape) == 3}
    width, half = EXPERTS.hidden_size, EXPERTS.intermediate_size // 2
    assert {(3, half, width), (3, width, half)} == {shape for shape in gathered if shape[0] == 3}
    blocks = [c for c in of_kind(collectives, "all-reduce") if c.arrays[0].shape == (256, width)]
    assert len(blocks) == 2 and {c.group for c in blocks} == {2}


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_tensor_sums_activations_of_the_own_rows(axes: dict[str, int]) -> None:
    collectives, weights, *_ = step(**axes)
    sums = [c for c in of_kind(collectives, "all-reduce") if "while" in c.op_name]
    layers = {a.shape for c in sums for a in c.arrays if LENGTH in a.shape}
    assert layers == {(ROWS // 2, LENGTH, DECODER.hidden_size)}
    of_targets = [(c.times, a.shape) for c in sums for a in c.arrays if LENGTH not in a.shape]
    chunk = (ROWS // 2, CHUNK)  # the greatest logit, the sum over them, the target's, and the gradient: no logits
    assert {times for times, _ in of_targets} == {TARGETS // CHUNK}
    assert sorted(shape for _, shape in of_targets) == [chunk, chunk, (*chunk, 1), (*chunk, DECODER.hidden_size)]
    halves = {shape: name for name, whole in weights.items() for shape in _half(whole)}
    for gather in of_kind(collectives, "all-gather"):
        for array in gather.arrays:
            assert array.shape in halves or array.shape[0] == ROWS // 2, gather


def _half(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(shape[0] // 2, shape[1]), (shape[0], shape[1] // 2)]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_user_vectors_stay_with_their_rows(axes: dict[str, int]) -> None:
    for collective in step(**axes).collectives:
        for array in collective.arrays:
            assert SEGMENTS not in array.shape, collective
            assert WIDTH not in array.shape or collective.kind == "all-reduce"  # gradients of the first matrices


def test_these_tests_see_a_trained_backbone() -> None:
    collectives, weights, trainable, *_ = step(EVERYTHING, data=4)
    summed = of_kind(collectives, "all-reduce", "reduce-scatter")
    assert {weights["q"], weights["down"]} <= {a.shape for c in summed for a in c.arrays}
    assert trainable > sum(int(np.prod(shape)) for shape in weights.values())
