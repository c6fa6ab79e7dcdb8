"""The train step compiled for NVIDIA's cards, which jax's CUDA plugin does with no card and no driver at hand.

Runs where `jax[cuda13]` is installed, jax 0.11.2 or newer (Python 3.12): CI has a job of its own for it.
"""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.quantization import decoding
from e2p_jax.backbone.families import DecoderConfig, parse_config
from e2p_jax.config import BackboneConfig, Config, DataConfig, MeshConfig, TrainConfig
from e2p_jax.parallel.mesh import make_mesh
from e2p_jax.plan.hlo import Program
from e2p_jax.plan.plan import RowShape, abstract_batch
from e2p_jax.plan.topology import find_topology
from e2p_jax.train.partition import split
from e2p_jax.train.setup import abstract_model, abstract_state, jit_train_step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA plugin: pip install 'e2p-jax[cuda13]'"
)
CONFIGS = Path(__file__).parents[2] / "configs" / "backbones" / "meta-llama"
ROWS, LENGTH, LAYERS, WIDTH, VOCABULARY = 2, 640, 3, 2048, 128256


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    """What is compiled for a card that is not there cannot be loaded again."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()


class Step(NamedTuple):
    """A compiled train step."""

    text: str
    program: Program
    state: Any  # shapes


def compiled(topology: str, mesh: MeshConfig, decoder: DecoderConfig, **backbone: Any) -> Step:
    place = find_topology(topology)
    settings = TrainConfig(rows=ROWS, logits_at_once=1 << 25)  # a card's memory would hold all of these at once
    config = Config(backbone=BackboneConfig(**backbone), data=DataConfig(seq_len=LENGTH), train=settings, mesh=mesh)
    devices = make_mesh(mesh, place.devices)
    model = abstract_model(config, decoder, 64, devices, place.memory)
    state, (_, frozen) = abstract_state(model, config.train), split(model.params, model.mask)
    batch = abstract_batch(config, RowShape(64, None, 7), devices)
    with jax.set_mesh(devices), jax.default_device(place.devices[0]):
        text = jit_train_step(model, config.train).lower(state, frozen, batch).compile().as_text()
    return Step(text, Program(text), state)


def shape() -> DecoderConfig:
    """Llama-3.2-1B of three layers; compiled programs are no smaller where it has all sixteen."""
    values = json.loads((CONFIGS / "Llama-3.2-1B" / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    return parse_config(values, Path("config.json"))


@functools.cache
def llama(topology: str, *mesh: int) -> Step:
    return compiled(topology, MeshConfig(*mesh), shape())


def test_attention_runs_once_forward_and_once_backward() -> None:
    """No loop is left but that of the loss: layers are written out."""
    program = llama("h100:1", 1, 1, 1).program
    assert program.kernels == {"__cudnn$fmhaSoftmax": LAYERS, "__cudnn$fmhaSoftmaxBackward": LAYERS}
    assert program.loops == 1 and not program.unknown_loops
    sorts = {times for one, _, times in program.instructions() if one.opcode == "sort"}
    assert sorts == {1}  # where segments lie is worked out once, and not in every layer


def test_the_backbone_multiplies_in_bfloat16_and_the_projector_in_float32() -> None:
    kinds: dict[str, float] = {}
    for one, around, times in llama("h100:1", 1, 1, 1).program.instructions():
        if one.opcode == "dot":
            left, right = (around[name].arrays[0].dtype for name in one.operands)
            assert left == right
            size = times * one.arrays[0].nbytes
            kinds[left] = kinds.get(left, 0) + size
            assert left == "bf16" or "operand_precision={highest,highest}" in one.attributes
    assert kinds["f32"] < 0.05 * kinds["bf16"]  # the projector's, of a few users a row


def test_no_array_holds_the_logits_of_all_positions_or_the_scores_of_all_pairs() -> None:
    for one, _, _ in llama("h100:1", 1, 1, 1).program.instructions():
        for array in one.arrays:
            assert not (VOCABULARY in array.shape and array.shape.count(LENGTH)), one
            assert array.shape.count(LENGTH) < 2, one


def test_frozen_weights_are_cut_out_of_their_stack_once_a_pass_at_most() -> None:
    """What is cut out for the forward pass may serve the backward pass, too; and no stack is ever copied."""
    program = llama("h100:1", 1, 1, 1).program
    stacks = {(LAYERS, 8192, WIDTH): 2, (LAYERS, WIDTH, 8192): 1, (LAYERS, WIDTH, WIDTH): 2, (LAYERS, 512, WIDTH): 2}
    reads: dict[tuple[int, ...], int] = {}
    for one, around, times in program.instructions():
        if one.opcode == "slice" and (shape := around[one.operands[0]].arrays[0].shape) in stacks:
            reads[shape] = reads.get(shape, 0) + times
        made = one.opcode not in ("parameter", "get-tuple-element", "tuple", "while", "fusion-start", "bitcast")
        assert not (made and any(array.shape in stacks for array in one.arrays)), one
    assert reads.keys() == stacks.keys()
    for shape, count in stacks.items():
        assert LAYERS * count <= reads[shape] <= 2 * LAYERS * count, shape


def test_the_state_is_donated() -> None:
    step = llama("h100:1", 1, 1, 1)
    aliases = re.findall(r"\{(\d+)\}: \((\d+), \{\}", step.text.splitlines()[0])
    assert [(int(out), int(into)) for out, into in aliases] == [(n, n) for n in range(len(jax.tree.leaves(step.state)))]


def test_on_two_hosts_a_layer_gathers_its_weights_and_nothing_else_is_sent_in_it() -> None:
    program = llama("h100:2x1", 1, 2, 1).program
    assert program.kernels == {"__cudnn$fmhaSoftmax": LAYERS, "__cudnn$fmhaSoftmaxBackward": LAYERS}
    sent = [one for one in program.collectives if one.times == LAYERS]
    assert sent and all(one.kind == "all-gather" for one in sent)
    assert {array.shape for one in sent for array in one.arrays} <= {
        (8192, WIDTH), (WIDTH, 8192), (WIDTH, WIDTH), (512, WIDTH)
    }  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="needs tokamax: pip install 'e2p-jax[kernels]'")
@pytest.mark.filterwarnings("ignore")
def test_soft_caps_and_windows_are_tokamaxs() -> None:
    """Of Gemma 2's kind, too, attention runs once forward and, in two kernels, once backward."""
    decoder = dataclasses.replace(shape(), attention_cap=50.0, windows=(0, 64, 0))
    program = compiled("h100:1", MeshConfig(1, 1, 1), decoder).program
    assert sum(program.kernels.values()) == 3 * LAYERS
    assert program.loops == 1 and not program.unknown_loops


def test_decoding_from_quantised_weights_reads_fewer_bytes_than_from_bfloat16() -> None:
    """Of int8 half: it is converted inside the product. The 4-bit kinds are written out a matrix at a time."""
    traffic = {kind: decoding(kind, "h100:1", 16)["traffic"] for kind in ("none", "int8", "int4", "nf4")}
    assert traffic["int8"] < 0.55 * traffic["none"]
    assert max(traffic["int4"], traffic["nf4"]) < 0.8 * traffic["none"]


def test_what_ampere_gets_is_plain_xla() -> None:
    """CuDNN's packed layout begins with Hopper."""
    assert not llama("a100:1", 1, 1, 1).program.kernels
