"""Plans of the steps that a run takes, from shapes alone; what they suggest; for TPUs where libtpu is installed."""

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import mesh_of

from e2p_jax.backbone.families import read_config
from e2p_jax.cli import main
from e2p_jax.config import BackboneConfig, Config, DataConfig, MeshConfig, TrainConfig
from e2p_jax.errors import UserError
from e2p_jax.plan import plan as planning
from e2p_jax.plan import topology as topology_module
from e2p_jax.plan.plan import Cost, Plan, RowShape, largest_rows, other_meshes
from e2p_jax.plan.topology import Chip, Topology, find_topology
from e2p_jax.prefix import mlp
from e2p_jax.train.setup import abstract_model, abstract_state, initial_state, jit_train_step, logits_at_once

WIDTH = 8
SHAPE = RowShape(embedding_width=WIDTH, targets=64, segments=3)


@pytest.fixture(scope="module")
def shapes(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of which only config.json is there."""
    directory = tmp_path_factory.mktemp("shapes")
    shutil.copyfile(tiny_backbone / "config.json", directory / "config.json")
    return directory


@pytest.fixture(scope="module")
def config(shapes: Path) -> Config:
    return Config(
        backbone=BackboneConfig(path=str(shapes), remat=True),
        data=DataConfig(seq_len=128),
        projector=mlp.Settings(hidden_size=16),
        train=TrainConfig(rows=8, steps=10, warmup_steps=2),
        mesh=MeshConfig(data=1, fsdp=4),
    )


@pytest.fixture(scope="module")
def plan(config: Config, shapes: Path) -> Plan:
    return planning.make_plan(config, read_config(shapes), find_topology("cpu:4"), SHAPE)


def test_the_planned_step_is_the_one_that_runs(config: Config, shapes: Path, plan: Plan) -> None:
    """Compiled around arrays in place of shapes it is the same program, and takes as many bytes as they have."""
    mesh = mesh_of(fsdp=4)
    model = abstract_model(config, read_config(shapes), WIDTH, mesh)
    params = jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), model.params)
    real = dataclasses.replace(model, params=params)
    state, frozen = initial_state(real, config.train)
    planned = abstract_state(model, config.train)
    for array, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(planned), strict=True):
        assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype)
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim)
    batch = planning.abstract_batch(config, SHAPE, mesh)
    with jax.set_mesh(mesh):
        compiled = jit_train_step(real, config.train).lower(state, frozen, batch).compile()
    assert plan.steps["train"].arguments == compiled.memory_analysis().argument_size_in_bytes
    assert plan.steps["train"].temporary == compiled.memory_analysis().temp_size_in_bytes
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state._replace(key=None), frozen)))
    rows = sum(int(np.prod(leaf.shape)) * 4 // 4 for leaf in jax.tree.leaves(batch))  # of 4 bytes, over 4 devices
    assert 0 <= plan.steps["train"].arguments - local - rows < 1024  # the key, and a table of pointers


@pytest.fixture(autouse=True)
def kept_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command turns the compilation cache off in its environment; not in that of later tests."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_command(
    config: Config, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "_ROW_TRIALS", 1)  # `test_the_most_rows_that_fit` sees the rest
    stored = tmp_path / "config.json"
    stored.write_text(config.to_json())
    row = ["--embedding-width", str(WIDTH), "--targets", "64", "--segments", "3"]
    command = [str(stored), "--topology", "cpu:4", *row]
    code, out, err = run([*command, "--json"], capsys)
    values = json.loads(out)
    assert code == 0 and values["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    (train, evaluate), planned = values["steps"].values(), plan.steps["train"]
    assert train["arguments"] == planned.arguments and train["flops"] == planned.flops
    assert train["collective_bytes"] == planned.received == sum(c["bytes"] for c in train["collectives"].values())
    assert train["flops"] > 2 * evaluate["flops"] > 0
    assert values["largest_rows"]["rows"] > 8 and values["largest_rows"]["fits"]
    # Of a model this small one copy per device is best.
    assert values["fewest_collective_bytes"]["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert "data=2 x fsdp=2 x tensor=1, 8 rows" in err

    code, out, _ = run([*command, "--no-suggest", "--train.rows", "4", "--mesh.fsdp", "2", "--mesh.data", "2"], capsys)
    assert code == 0 and "cpu:4, data=2 x fsdp=2 x tensor=1, 4 rows (1 per device)" in out
    for line in (
        "arguments, MiB",
        "temporary, MiB",
        "matrix TFLOP",
        "FLOP per byte",
        "all-gather, times and MiB",
        "logits of the loss at once: 33,554,432 (128.0 MiB)",
    ):
        assert line in out


def test_a_catalogue_is_counted(config: Config, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is learned of every item, with its two moments, its given vector, and the items that a batch names."""
    stored = tmp_path / "config.json"
    stored.write_text(config.change(items={"width": 16}).to_json())
    row = ["--embedding-width", str(WIDTH), "--targets", "64", "--segments", "3"]
    catalogue = ["--items", "40000", "--item-width", "8", "--items-named", "5"]
    code, out, _ = run([str(stored), "--topology", "cpu:4", *row, *catalogue, "--no-suggest", "--json"], capsys)
    more = json.loads(out)["steps"]["train"]["arguments"] - plan.steps["train"].arguments
    assert code == 0 and 0 <= more - 4 * 40000 * (3 * 16 + 8) / 4 < 16384  # over 4 devices; the rest is small
    code, _, err = run([str(stored), "--topology", "cpu:4", "--items", "-1"], capsys)
    assert code == 2 and "what --items says must be positive" in err


def test_the_losses_chunk_is_that_of_the_devices_memory(config: Config, shapes: Path) -> None:
    """A 64th of it in float32; on a CPU, which says none, 2^25; or what the config says."""
    card = Topology("", [SimpleNamespace(platform="gpu")], Chip(80 * 2**30))
    assert logits_at_once(TrainConfig(), card.memory) == 80 * 2**30 // 64 // 4
    assert find_topology("cpu:4").memory == 0 and logits_at_once(TrainConfig(), 0) == 2**25
    assert logits_at_once(TrainConfig(logits_at_once=7), card.memory) == 7
    model = abstract_model(config, read_config(shapes), WIDTH, mesh_of(fsdp=4), card.memory)
    assert model.merged.backbone.execution.logits_at_once == card.memory // 64 // 4


def test_what_does_not_fit_ends_with_1(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config.to_json())
    small = find_topology("cpu:4")
    monkeypatch.setattr(topology_module, "find_topology", lambda _: dataclasses.replace(small, chip=Chip(100_000)))
    command = [str(tmp_path / "config.json"), "--topology", "cpu:4", "--embedding-width", "8"]
    code, out, err = run(command, capsys)
    assert code == 1 and "peak, MiB of 0.1" in out
    assert "not one row per device fits" in out and "fewest" not in out
    assert "8 rows of 128 tokens take " in err and "lower train.rows, split over more devices with mesh.fsdp" in err


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v4:2x2", "give cpu:N; a TPU and its grid: .* or NVIDIA's cards, a100, h100"),
        ("h100:8x", "give cpu:N"),
        ("h100:0", "give cpu:N"),
        ("cpu:0", "give cpu:N"),
        ("v5e", "give cpu:N"),
        ("v5e:16", "give cpu:N"),
        ("cpu:5", "this process has 4 CPU devices"),
    ],
)
def test_topologies_that_are_not_understood(topology: str, message: str) -> None:
    assert jax.device_count() == 4  # jax has started
    with pytest.raises(UserError, match=message):
        find_topology(topology)


def test_rows_that_do_not_spread_are_refused(config: Config, shapes: Path) -> None:
    with pytest.raises(UserError, match=r"train\.rows=6 does not divide by mesh\.data x mesh\.fsdp"):
        planning.make_plan(config.change(train={"rows": 6}), read_config(shapes), find_topology("cpu:4"), SHAPE)


@pytest.mark.parametrize(
    ("given", "fixed", "a_row", "found"), [(16, 100, 10, 88), (8, 100, 10, 88), (400, 100, 10, 88), (8, 950, 10, None)]
)
def test_the_most_rows_that_fit(given: int, fixed: int, a_row: int, found: int | None) -> None:
    """Of memory = fixed + a_row x rows within 1,000, on 8 row shards."""
    best, compiled = search(given, lambda rows: fixed + a_row * rows)
    assert best == found and len(compiled) <= 4


def test_the_most_rows_where_memory_does_not_grow_evenly() -> None:
    best, compiled = search(16, lambda rows: 100 + 10 * rows + 300 * (rows > 60))
    assert best == 56 and len(compiled) <= 7


def search(given: int, peak: Callable[[int], int]) -> tuple[int | None, list[int]]:
    compiled = []

    def compile_rows(rows: int) -> Plan:
        assert rows % 8 == 0
        compiled.append(rows)
        return Plan(
            Topology("t", [], Chip(1000)), {"data": 2, "fsdp": 4, "tensor": 2}, rows, 0, {"": Cost(peak=peak(rows))}
        )

    best = largest_rows(compile_rows(given), compile_rows)
    return best and best.rows, compiled


@pytest.mark.parametrize(
    ("refusal", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm.", 16.5 * 2**30),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.92G) "
            "exceeds available HBM (15.75G).",
            int(16.92 * 2**30) + 100,
        ),
        ("INTERNAL: Mosaic failed to compile. Used 16.50G of 15.75G hbm.", None),
    ],
)
def test_what_libtpu_says_of_a_program_that_does_not_fit(refusal: str, needed: float | None) -> None:
    """As libtpu 0.0.42.1 words it; where its temporaries alone are too many, the arguments come on top."""
    assert planning._needed(refusal, arguments=100) == needed


def test_other_meshes_hold_the_weights(config: Config, shapes: Path) -> None:
    decoder, place = read_config(shapes), find_topology("cpu:4")

    def meshes(memory: int, rows: int = 8) -> set[tuple[int, ...]]:
        tight = dataclasses.replace(place, chip=Chip(memory))
        return {
            dataclasses.astuple(m) for m in other_meshes(config.change(train={"rows": rows}), decoder, tight, SHAPE)
        }

    every = {(4, 1, 1), (2, 2, 1), (1, 4, 1)}  # one key-value head: no tensor axis
    assert meshes(1 << 40) == every
    whole, half = (
        planning.make_plan(dataclasses.replace(config, mesh=MeshConfig(data, fsdp)), decoder, place, SHAPE)
        .steps["train"]
        .arguments
        for data, fsdp in ((4, 1), (2, 2))
    )
    assert half < whole and meshes((whole + half) // 2) < every
    assert meshes(1 << 40, rows=6) == set()


def test_the_longest_part_sets_the_pace() -> None:
    cost = Cost(flops=4e12, traffic=10**9, collectives={"all-gather": (3, 2 * 10**9), "all-reduce": (1, 10**9)})
    seconds = cost.seconds(Chip(1, flops=1e12, bandwidth=1e9, interconnect=1e9))
    assert seconds == {"compute": 4.0, "memory": 1.0, "interconnect": 3.0}
    assert cost.seconds(Chip(1)) == {}


@pytest.mark.parametrize("name", ["llama_1b", "llama_8b", "llama_70b"])
def test_shapes_of_the_shipped_configs_need_no_hub(name: str) -> None:
    from e2p_jax.config import load_config

    _, config = load_config(name)
    decoder = planning.read_backbone(config)
    layers = {"llama_1b": 16, "llama_8b": 32, "llama_70b": 80}
    assert decoder.num_layers == layers[name]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the CUDA plugin is installed")
def test_without_the_cuda_plugin_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match=r"CUDA plugin is not installed.*pip install 'e2p-jax\[cuda13\]'"):
        find_topology("h100:8")


@pytest.mark.parametrize(("name", "interconnect"), [("h100:1", 450e9), ("h100:2x8", 50e9)])
def test_what_a_card_gives(name: str, interconnect: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a host NVLink, else the network; of the memory what `launch/run.sh` sets, or the environment."""
    monkeypatch.setattr(topology_module, "_described", lambda *_, **options: [options])
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    place = find_topology(name)
    assert place.chip == Chip(int(84_942_979_072 * 0.92), 989e12, 3_352_320_000_000, interconnect)
    (options,) = place.devices
    assert options["topology"] == {"h100:1": "1x1x1", "h100:2x8": "1x2x8"}[name]  # slices, hosts, cards of each
    assert "core_count: 132" in options["target_config"] and "major: 9 minor: 0" in options["target_config"]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert find_topology(name).chip.memory == 84_942_979_072 // 2


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here")
def test_without_libtpu_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match=r"libtpu is not installed.*pip install 'e2p-jax\[tpu\]'.*or plan for cpu:N"):
        find_topology("v5e:4x4")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'e2p-jax[tpu]'")
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # which the command turns off
@pytest.mark.parametrize(
    ("topology", "axes"),
    [("v5e:2x2", (1, 4)), ("v5p:2x2x1", (2, 2)), ("v6e:2x2", (4, 1)), ("tpu7x:2x2x1", (2, 4)), ("v5e:2x2:2", (2, 4))],
)
def test_tpu(config: Config, shapes: Path, topology: str, axes: tuple[int, int]) -> None:
    """Splash attention stands in both compiled steps: forward alone, and with its two backward kernels."""
    decoder = dataclasses.replace(read_config(shapes), head_dim=128)  # of a width that the kernel takes
    plan = planning.make_plan(
        dataclasses.replace(config, mesh=MeshConfig(*axes)), decoder, find_topology(topology), SHAPE
    )
    assert len(plan.steps["evaluate"].kernels) >= 1 and len(plan.steps["train"].kernels) >= 3
    assert plan.fits and plan.steps["train"].received > 0
