"""The train step on one accelerator: right, beside the CPU; how fast, by kind of attention; and where its time goes.

    python benchmarks/card.py check                                  # kernels, loss and gradient against float32
    python benchmarks/card.py step --shape 3b --rows 4 --profile     # utilisation, memory, the slowest kernels
    python benchmarks/card.py largest --shape 8b --remat             # the most rows whose program fits, by compiling

Random weights, made on the device: no torch and no files. Rows are full, of eight examples each, every second token
a target. Lines of JSON.
"""

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import arithmetic
import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import tyro
from made_up import WIDTH, random_rows

from e2p_jax.backbone.attention import attention, visibility, whole_rows
from e2p_jax.backbone.families import DecoderConfig, parse_config
from e2p_jax.config import BackboneConfig, Config, DataConfig, MeshConfig, TrainConfig
from e2p_jax.data.packing import longest_of
from e2p_jax.parallel.mesh import make_mesh
from e2p_jax.prefix import mlp
from e2p_jax.train import setup
from e2p_jax.train.partition import split

Shape = Literal["small", "135m", "1b", "3b", "8b"]
Kind = Literal["auto", "xla", "splash", "cudnn", "mosaic"]
Quantization = Literal["none", "int8", "int4", "nf4"]
# Width, hidden width, layers, heads, groups, vocabulary, tied head: of SmolLM2-135M, Llama-3.2-1B, 3B, Llama-3.1-8B.
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "small": (512, 1024, 2, 8, 2, 4096, True),
    "135m": (576, 1536, 30, 9, 3, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "3b": (3072, 8192, 28, 24, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}
# Heads, groups, width of a head, soft cap, window.
HEADS = {"1b": (32, 8, 64, 0.0, 0), "8b": (32, 8, 128, 0.0, 0), "gemma": (8, 4, 256, 50.0, 512)}


def llama(shape: Shape) -> DecoderConfig:
    width, hidden, layers, heads, groups, vocabulary, tied = SHAPES[shape]
    values = {"model_type": "llama", "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    values |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary}
    values |= {"tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
    return parse_config(values, Path("config.json"))


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def segments(rows: int, length: int, count: int) -> np.ndarray:
    """[B, T] int32: uneven ones, the end of every row but the first padding."""
    rng, out = np.random.default_rng(0), np.zeros((rows, length), np.int32)
    for row in range(rows):
        end = length - row * length // 64
        cuts = np.sort(rng.choice(np.arange(1, end), count - 1, replace=False))
        out[row, :end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
    return out


def uneven(rows: int, length: int, count: int, vocabulary: int) -> dict[str, np.ndarray]:
    """As `random_rows`, of `segments`."""
    batch = random_rows(rows, length, count, vocabulary)
    ids = batch["segment_ids"][:] = segments(rows, length, count)
    most = max(int(np.bincount(row[row > 0]).max()) for row in ids)
    batch["longest"] = np.zeros((rows, longest_of(most, length)), np.int8)
    first = np.stack([np.searchsorted(np.where(row > 0, row, count + 1), row) for row in ids])
    batch["positions"][:] = np.where(ids > 0, np.arange(length) - first, 0)
    batch["slots"][:] = np.where((ids > 0) & (batch["positions"] == 0), ids - 1, -1)
    targets = np.take_along_axis(ids, batch["target_positions"], axis=1)
    follows = np.take_along_axis(ids, batch["target_positions"] + 1, axis=1)
    batch["target_weights"][:] = (targets > 0) & (targets == follows)
    return batch


def filled(model: setup.Model) -> setup.Model:
    """Random numbers where the model has shapes, a layer at a time."""

    def fill(path: tuple, leaf: Any, key: jax.Array) -> jax.Array:
        name = str(path[-1].key)

        def piece(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                return jax.random.bits(key, shape, jnp.dtype(f"uint{leaf.dtype.itemsize * 8}")).astype(leaf.dtype)
            if "norm" in name or name.endswith(("input_std", "token_std")):
                return jnp.ones(shape, leaf.dtype)
            scale = 3e-4 if name.endswith("_scale") else 0.02
            return (scale * jax.random.normal(key, shape, jnp.float32)).astype(leaf.dtype)

        def make(key: jax.Array) -> jax.Array:
            if len(leaf.shape) < 3:
                return piece(key, leaf.shape)
            return jax.lax.map(lambda one: piece(one, leaf.shape[1:]), jax.random.split(key, leaf.shape[0]))

        made: jax.Array = jax.jit(make, out_shardings=leaf.sharding)(key)
        return made

    paths, tree = jax.tree_util.tree_flatten_with_path(model.params)
    keys = jax.random.split(jax.random.key(0), len(paths))
    values = [fill(path, leaf, key) for (path, leaf), key in zip(paths, keys, strict=True)]
    return dataclasses.replace(model, params=jax.tree.unflatten(tree, values), fingerprint="random")


def abstract(
    shape: Shape, rows: int, length: int, device: Any, attention: Kind, **backbone: Any
) -> tuple[Config, setup.Model]:
    config = Config(
        backbone=BackboneConfig(attention=attention, **backbone),
        data=DataConfig(seq_len=length),
        projector=mlp.Settings(dropout=0.0),
        train=TrainConfig(rows=rows),
    )
    return config, setup.abstract_model(config, llama(shape), WIDTH, make_mesh(MeshConfig(), [device]))


def placed(batch: dict[str, np.ndarray], model: setup.Model) -> dict[str, jax.Array]:
    out: dict[str, jax.Array] = jax.device_put(batch, jax.sharding.NamedSharding(model.mesh, jax.P()))
    return out


def off(found: Any, truth: Any) -> float:
    """Norm of the difference, as a share of the truth's."""
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    return float(f"{np.linalg.norm(found - truth) / np.linalg.norm(truth):.3g}")


def attempt(run: Callable[[], dict[str, Any]], **case: Any) -> None:
    """Says what one case gave; its refusal is a figure, too."""
    try:
        figures = run()
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    say(**case, **figures)


def kernel(name: str, kind: Any, rows: int, length: int, count: int) -> dict[str, Any]:
    """A kernel alone: output and gradients of one row against float32, and milliseconds of all rows."""
    heads, groups, width, cap, window = HEADS[name]
    config: Any = dataclasses.replace(
        llama("small"), attention_scale=width**-0.5, attention_cap=cap, windows=(window,), head_dim=width
    )
    ids = segments(rows, length, count)
    keys = jax.random.split(jax.random.key(1), 4)
    *x, pull = (
        jax.random.normal(key, (rows, length, n, width), jnp.bfloat16)
        for key, n in zip(keys, (heads, groups, groups, heads), strict=True)
    )
    live = jnp.asarray(ids > 0)[..., None, None]

    def ours(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return jnp.where(live[: len(q)], whole_rows(kind, ids, config, count)(q, k, v, window, None), 0)

    def plain(q: Any, k: Any, v: Any, ids: Any) -> Any:
        index = jnp.broadcast_to(jnp.arange(length), ids.shape)
        out = attention(q, k, v, visibility(ids, ids, index, index), window, scale=width**-0.5, cap=cap)
        return jnp.where(live[: len(q)], out, 0)

    def with_gradients(run: Any, pull: Any, ids: Any, *x: Any) -> Any:
        out, back = jax.vjp(lambda *x: run(*x, ids), *x)
        return out, *back(pull)

    both = jax.jit(functools.partial(with_gradients, ours))
    one = [np.asarray(a[:1], np.float32) for a in x]
    with jax.default_matmul_precision("highest"):
        truth = jax.jit(functools.partial(with_gradients, plain))(np.asarray(pull[:1], np.float32), ids[:1], *one)
    found = [a[:1] for a in both(pull, ids, *x)]
    times = []
    forward = jax.jit(ours)
    for run in (lambda: forward(*x, ids), lambda: both(pull, ids, *x)):
        contender = measure.Contender("", lambda run=run: jax.block_until_ready(run()), 1)
        measure.take_turns([contender], 10)
        times.append(round(1e3 * float(np.median(contender.seconds)), 3))
    wrong = {part: off(f, t) for part, f, t in zip(("out", "dq", "dk", "dv"), found, truth, strict=True)}
    return {"off": wrong, "forward_ms": times[0], "both_ms": times[1]}


def first_step(device: Any, kind: Kind, dtype: str) -> tuple[float, np.ndarray]:
    """Loss of a small model, and the clipped gradient as AdamW's first moment has it, in one row."""
    config, model = abstract("small", 4, 512, device, kind, dtype=dtype)
    with jax.default_device(device):
        model = filled(model)
        state, frozen = setup.initial_state(model, config.train)
        with jax.set_mesh(model.mesh):
            batch = placed(uneven(4, 512, 4, SHAPES["small"][5]), model)
            state, metrics = setup.jit_train_step(model, config.train)(state, frozen, batch)
    moments = jax.tree.leaves(optax.tree.get(state.optimizer, "mu"))
    return float(metrics.loss), np.concatenate([np.ravel(np.asarray(moment)) for moment in moments])


def check(rows: int = 4, length: int = 2048, examples: int = 8) -> None:
    """Attention's kernels at real shapes and a small model's step, against float32; bfloat16 is off by 0.01 or less.

    Args:
      rows: Of attention.
      length: T of attention.
      examples: A row.
    """
    here = jax.devices()[0]
    say(device=here.device_kind, jax=jax.__version__, memory=(here.memory_stats() or {}).get("bytes_limit"))
    loss, gradient = first_step(jax.devices("cpu")[0], "xla", "float32")
    say(check="step", device="cpu", dtype="float32", loss=loss)

    def step(kind: Kind, dtype: str) -> dict[str, Any]:
        found, other = first_step(here, kind, dtype)
        return {"loss": found, "off": {"loss": abs(found / loss - 1), "gradient": off(other, gradient)}}

    kinds: tuple[Kind, ...] = ("xla", "cudnn", "mosaic") if here.platform == "gpu" else ("xla",)
    for dtype in ("float32", "bfloat16"):
        for kind in kinds if dtype == "bfloat16" else ("xla",):
            attempt(functools.partial(step, kind, dtype), check="step", kind=kind, dtype=dtype)
    for name in HEADS:
        for kind in kinds:
            if kind != "cudnn" or not HEADS[name][3]:  # it has no soft cap
                one = functools.partial(kernel, name, kind, rows, length, examples)
                attempt(one, check="attention", kind=kind, heads=name)


def kernels_of(directory: Path) -> list[tuple[str, float, int]]:
    """(name, milliseconds, launches) of a profile's kernels, the slowest first."""
    totals: dict[str, tuple[float, int]] = {}
    for file in directory.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines if "GPU" in plane.name else ():
                for event in line.events if "Stream" in line.name else ():
                    ms, count = totals.get(event.name, (0.0, 0))
                    totals[event.name] = ms + event.duration_ns / 1e6, count + 1
    return sorted(((name, ms, count) for name, (ms, count) in totals.items()), key=lambda item: -item[1])


def step(
    shape: Shape = "1b",
    rows: int = 8,
    length: int = 2048,
    examples: int = 8,
    attention: Kind = "auto",
    quantization: Quantization = "none",
    remat: bool = False,
    repeats: int = 5,
    profile: bool = False,
) -> None:
    """Milliseconds of the train step, the share of the device's own rate of products, and memory.

    Args:
      shape: Of the random Llama.
      rows: B.
      length: T.
      examples: A row.
      attention: backbone.attention.
      quantization: backbone.quantization.
      remat: backbone.remat.
      repeats: Steps timed.
      profile: List the slowest kernels of one step.
    """
    device = jax.devices()[0]
    peak = arithmetic.matmul_rate(jnp.bfloat16, 8192 if device.platform != "cpu" else 512, "wall")
    config, model = abstract(shape, rows, length, device, attention, quantization=quantization, remat=remat)
    model = filled(model)
    batch = random_rows(rows, length, examples, SHAPES[shape][5])
    on_device = placed(batch, model)
    state, frozen = setup.initial_state(model, config.train)
    holder = [state]
    started = time.perf_counter()
    with jax.set_mesh(model.mesh):
        compiled = setup.jit_train_step(model, config.train).lower(state, frozen, on_device).compile()
    compile_s = time.perf_counter() - started

    def run() -> float:
        with jax.set_mesh(model.mesh):
            holder[0], metrics = compiled(holder[0], frozen, on_device)
        return float(metrics.loss)

    contender = measure.Contender("", run, rows * length)
    measure.take_turns([contender], repeats)
    median = float(np.median(contender.seconds))
    flops, memory = arithmetic.needed_flops(llama(shape), batch), compiled.memory_analysis()
    say(
        shape=shape,
        rows=rows,
        attention=attention,
        quantization=quantization,
        remat=remat,
        ms=round(1e3 * median, 2),
        least_ms=round(1e3 * min(contender.seconds), 2),
        tokens_per_s=round(rows * length / median),
        utilisation=round(flops / median / peak, 4),
        tflops=round(flops / median / 1e12, 1),
        matmul_tflops=round(peak / 1e12, 1),
        loss=round(run(), 4),
        arguments_gib=round(memory.argument_size_in_bytes / 2**30, 2),
        temporary_gib=round(memory.temp_size_in_bytes / 2**30, 2),
        peak_gib=round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, 2),
        compile_s=round(compile_s, 1),
        device=device.device_kind,
    )
    if not profile:
        return
    with tempfile.TemporaryDirectory() as place:
        with jax.profiler.trace(place):
            run()
        kernels = kernels_of(Path(place))
    say(launches=sum(count for *_, count in kernels), ms_in_kernels=round(sum(ms for _, ms, _ in kernels), 2))
    for name, ms, count in kernels[:25]:
        print(f"{ms:9.2f} ms {count:6d}  {name[:120]}", flush=True)


def largest(
    shape: Shape = "8b",
    length: int = 2048,
    examples: int = 8,
    attention: Kind = "auto",
    quantization: Quantization = "none",
    remat: bool = False,
    least: int = 1,
    most: int = 256,
) -> None:
    """Doubles the rows until the compiled step is larger than the device's memory.

    Args:
      shape: Of the random Llama.
      length: T.
      examples: A row.
      attention: backbone.attention.
      quantization: backbone.quantization.
      remat: backbone.remat.
      least: Rows to begin with.
      most: Rows to end with.
    """
    device = jax.devices()[0]
    limit, rows, fitting = (device.memory_stats() or {}).get("bytes_limit", 8 << 30), least, 0
    while rows <= most:
        config, model = abstract(shape, rows, length, device, attention, quantization=quantization, remat=remat)
        arrays = random_rows(rows, length, examples, SHAPES[shape][5])
        whole = jax.sharding.NamedSharding(model.mesh, jax.P())
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for name, x in arrays.items()}
        state, (_, frozen) = setup.abstract_state(model, config.train), split(model.params, model.mask)
        with jax.set_mesh(model.mesh):
            memory = setup.jit_train_step(model, config.train).lower(state, frozen, batch).compile().memory_analysis()
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        total += memory.output_size_in_bytes - memory.alias_size_in_bytes
        say(shape=shape, rows=rows, gib=round(total / 2**30, 2), of_gib=round(limit / 2**30, 2), remat=remat)
        if total > limit:
            break
        rows, fitting = 2 * rows, rows
    say(shape=shape, largest_rows=fitting, remat=remat, quantization=quantization)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"check": check, "step": step, "largest": largest})
