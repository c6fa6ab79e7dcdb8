"""Costs read from HLO: against counts by hand, PyTorch's FLOP counter, and programs whose sizes are known."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from helpers import hf_config, hf_model, mesh_of, prefix_model, random_batch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torch.utils.flop_counter import FlopCounterMode

from e2p_jax.plan.hlo import Program

N, LAYERS = 64, 5


def program(function: Any, *arguments: Any) -> Program:
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    """Where XLA's own analysis counts once."""

    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        def outer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x), None

        return jax.lax.scan(outer, x, weights)[0]

    ours = program(layers, shape(N, N), shape(LAYERS, N, N))
    assert ours.flops == 3 * LAYERS * 2 * N**3 and not ours.unknown_loops


def test_a_loop_is_counted_by_its_own_condition_where_xla_left_no_note() -> None:
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(2, 9, lambda _, y: jnp.tanh(y @ x), x)

    text = jax.jit(loop).lower(shape(N, N)).compile().as_text()
    ours = Program(text.replace("known_trip_count", "unknown"))
    assert ours.flops == 7 * 2 * N**3 and not ours.unknown_loops


@pytest.mark.parametrize("branches", [2, 3])
def test_every_branch_counts(branches: int) -> None:
    def choose(which: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.switch(which, [lambda x, n=n: jnp.sin(n + x) @ x for n in range(branches)], x)

    assert program(choose, jax.ShapeDtypeStruct((), jnp.int32), shape(N, N)).flops == branches * 2 * N**3


def test_parts_of_a_scattered_sum_come_from_all_others() -> None:
    text = (
        "ENTRY %main (a: f32[64,16]) -> f32[16,16] {\n  %a = f32[64,16]{1,0} parameter(0)\n  ROOT %r = f32[16,16]{1,0} "
        "reduce-scatter(%a), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add\n}\n"
    )
    (one,) = Program(text).collectives
    assert (one.kind, one.group, one.received) == ("reduce-scatter", 4, 3 * 4 * 16 * 16)


def test_a_loop_of_unknown_length_is_named() -> None:
    def until(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: jnp.sin(x @ x), x)

    ours = program(until, shape(N, N))
    assert len(ours.unknown_loops) == 1 and ours.flops == 2 * N**3


def test_flops_of_a_forward_pass_are_those_that_torch_counts() -> None:
    """But for the head: ours computes the logits of the targets alone."""
    config, (rows, length, targets) = hf_config(), (2, 128, 48)
    theirs = FlopCounterMode(display=False)
    with theirs, torch.no_grad():
        hf_model(config).model(torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    model, batch = prefix_model(), random_batch(rows=rows, length=length, targets=targets)
    ours = program(lambda batch: model.target_nll(batch), batch)
    projector = 0
    for name in ("skip", "up", "down"):
        projector += 2 * getattr(model.projector, name)[...].size * batch["user_embeddings"][..., 0].size
    head = 2 * rows * targets * config.hidden_size * config.vocab_size
    assert ours.flops == theirs.get_total_flops() + head + projector


def test_traffic_counts_slices_as_slices() -> None:
    megabyte = 1 << 20
    a = shape(megabyte // 4)
    assert program(lambda x, y: jnp.sin(x) + y, a, a).hbm_bytes == 3 * megabyte

    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x * w, None), x, weights)[0]

    whole = program(layers, a, shape(LAYERS, megabyte // 4)).hbm_bytes
    assert 3 * LAYERS * megabyte <= whole < 6 * LAYERS * megabyte  # each pass reads its layer, not all of them

    def collect(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x + 1, x), x, None, length=50)[1]

    assert program(collect, a).hbm_bytes < 50 * 8 * megabyte  # and writes its row, not all of them


def test_a_layer_that_is_fetched_ahead_counts_as_a_layer() -> None:
    """As XLA writes it for NVIDIA: copied by a fusion that starts early, and is waited for where it is used."""
    text = (
        "%slice (p: f32[5,64], i: s32[]) -> f32[1,64] {\n  %p = f32[5,64]{1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n  %z = s32[] constant(0)\n"
        "  ROOT %d = f32[1,64]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,64}\n}\n"
        "ENTRY %main (w: f32[5,64], n: s32[]) -> f32[1,64] {\n  %w = f32[5,64]{1,0} parameter(0)\n"
        "  %n = s32[] parameter(1)\n  %start = ((f32[5,64]{1,0}, s32[]), f32[1,64]{1,0}, u32[]) fusion-start(%w, %n), "
        "kind=kLoop, calls=%slice\n  ROOT %done = f32[1,64]{1,0} fusion-done(%start)\n}\n"
    )
    assert Program(text).hbm_bytes == 2 * 4 * 64 + 4  # read and written, and its number


def test_a_layer_that_is_cut_out_inside_of_a_fusion_counts_as_a_layer() -> None:
    """As XLA writes it for a TPU: the product's fusion holds another one, which cuts the layer out of all, and that
    may hold a third, which only says that the stack lies in other tiles.
    """
    text = (
        "%tiles (o: f32[5,64]) -> f32[5,64] {\n  %o = f32[5,64]{1,0} parameter(0)\n"
        "  ROOT %c = f32[5,64]{1,0} copy(%o)\n}\n"
        "%slice (p: f32[5,64], i: s32[]) -> f32[64] {\n  %p = f32[5,64]{1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n  %z = s32[] constant(0)\n"
        "  %t = f32[5,64]{1,0} fusion(%p), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiles\n"
        "  %d = f32[1,64]{1,0} dynamic-slice(%t, %i, %z), dynamic_slice_sizes={1,64}\n"
        "  ROOT %b = f32[64]{0} bitcast(%d)\n}\n"
        "%product (x: f32[64], q: f32[5,64], j: s32[]) -> f32[64] {\n  %x = f32[64]{0} parameter(0)\n"
        "  %q = f32[5,64]{1,0} parameter(1)\n  %j = s32[] parameter(2)\n"
        "  %cut = f32[64]{0} fusion(%q, %j), kind=kLoop, calls=%slice\n"
        "  ROOT %m = f32[64]{0} multiply(%x, %cut)\n}\n"
        "ENTRY %main (x: f32[64], w: f32[5,64], n: s32[]) -> f32[64] {\n  %x = f32[64]{0} parameter(0)\n"
        "  %w = f32[5,64]{1,0} parameter(1)\n  %n = s32[] parameter(2)\n"
        "  ROOT %out = f32[64]{0} fusion(%x, %w, %n), kind=kOutput, calls=%product\n}\n"
    )
    assert Program(text).hbm_bytes == 3 * 4 * 64 + 4


def test_attention_of_cudnn_counts_as_one_causal_segment_a_row() -> None:
    call = '(bf16[2,4,64,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmax"'
    text = (
        "ENTRY %main (q: bf16[2,64,4,16], k: bf16[2,64,2,16]) -> bf16[2,64,4,16] {\n"
        "  %q = bf16[2,64,4,16]{3,2,1,0} parameter(0)\n  %k = bf16[2,64,2,16]{3,2,1,0} parameter(1)\n"
        f"  %f = {call}\n  ROOT %b = {call.replace('Softmax', 'SoftmaxBackward')}\n}}\n"
    )
    ours = Program(text)
    assert ours.kernels == {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}
    assert ours.flops == (2 + 5) * 2 * 4 * 64 * 64 * 16  # two multiplications of half of all pairs, and five


@pytest.mark.parametrize(
    ("spec", "result", "kind", "received"),
    [
        (P("fsdp"), P(), "all-gather", 3 / 4),
        (P(None, "fsdp"), P("fsdp"), "all-to-all", 3 / 16),
    ],
)
def test_collectives_that_a_new_layout_takes(spec: P, result: P, kind: str, received: float) -> None:
    mesh = mesh_of(fsdp=4)
    x = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, result)).lower(x).compile().as_text()
    (one,) = Program(text).collectives
    assert (one.kind, one.group, one.times) == (kind, 4, 1)
    assert one.received == 4 * N * N * received


def test_a_sum_over_devices_in_a_loop() -> None:
    mesh = mesh_of(data=2, fsdp=2)
    x = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))

    def step(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ y.T @ x), None), x, None, length=LAYERS)[0]

    sums = [c for c in Program(jax.jit(step).lower(x).compile().as_text()).collectives if c.kind == "all-reduce"]
    assert {(c.group, c.times, c.nbytes) for c in sums} == {(2, LAYERS, 4 * N * N)}
    assert sums[0].received == LAYERS * 4 * N * N  # 2 (n - 1) / n of it, each time


def test_what_a_tpu_program_says() -> None:
    ours = Program((Path(__file__).parent / "data" / "tpu.hlo").read_text())  # in the forms that libtpu 0.0.42 writes
    found = {c.kind: (c.group, c.nbytes, c.received) for c in ours.collectives}
    assert found == {
        "collective-permute": (2, 2048, 2048),
        "all-gather": (8, 16384, 14336),  # two fusions hold parts of one
        "all-reduce": (16, 260, 488),
    }
    assert ours.flops == 1000 and ours.kernels == {"custom-call": 1}
    (start,) = [i for i, _, _ in ours.instructions() if i.opcode.startswith("collective-permute-start")]
    assert start.hbm_bytes == 2048 + 8  # one of its buffers stays on the core


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "flops"),
    [
        ("2048,4096", "4096,256", "2048,256", "dim_labels=bf_io->bf", 2 * 2048 * 4096 * 256),
        ("512,2048", "2048,64", "512,64", "dim_labels=bf_io->bf, batch_group_count=1", 2 * 512 * 2048 * 64),
        # Batched products: the batch is a spatial axis, and of size x size places only the diagonal is inside.
        (
            "8,64,128",
            "8,128,32",
            "8,64,32",
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            2 * 8 * 64 * 128 * 32,
        ),
        (
            "64,128,1",
            "2,256,128",
            "64,2,256",
            "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
            2 * 64 * 128 * 2 * 256,
        ),
    ],
)
def test_matrix_products_that_a_tpu_writes_as_convolutions(
    left: str, right: str, out: str, attributes: str, flops: int
) -> None:
    text = (
        f"ENTRY %main (a: bf16[{left}]) -> bf16[{out}] {{\n  %a = bf16[{left}]{{}} parameter(0)\n"
        f"  %b = bf16[{right}]{{}} parameter(1)\n"
        f"  ROOT %c = bf16[{out}]{{}} convolution(%a, %b), {attributes}\n}}\n"
    )
    assert Program(text).flops == flops


def test_xla_agrees_where_nothing_is_a_loop() -> None:
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum("bij,bjk->bik", x, y)

    compiled = jax.jit(product).lower(shape(3, N, 32), shape(3, 32, 16)).compile()
    assert Program(compiled.as_text()).flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)


def test_every_dtype_has_its_width() -> None:
    sizes = {"f32": 4, "bf16": 2, "s8": 1, "pred": 1, "u64": 8, "f8e4m3fn": 1, "c64": 8, "s4": 0.5}
    for dtype, size in sizes.items():
        text = f"ENTRY %main (a: {dtype}[8]) -> {dtype}[8] {{\n  ROOT %a = {dtype}[8]{{0}} parameter(0)\n}}\n"
        ((root, _, _),) = Program(text).instructions()
        assert root.nbytes == 8 * size, dtype
