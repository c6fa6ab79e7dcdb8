"""Compiling a run's steps for devices that are not here: memory, FLOPs, collectives, and what would be better.

The steps are those of `e2p train`, around shapes instead of weights.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from e2p_jax.backbone import weights
from e2p_jax.backbone.families import DecoderConfig, read_config
from e2p_jax.config import Config, MeshConfig
from e2p_jax.data.packing import Budget
from e2p_jax.data.pipeline import batch_shapes
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import bytes_per_device, make_mesh
from e2p_jax.plan.hlo import Program
from e2p_jax.plan.topology import Chip, Topology
from e2p_jax.prefix.model import Batch
from e2p_jax.train.partition import split
from e2p_jax.train.setup import abstract_model, abstract_state, jit_eval_step, jit_train_step, logits_at_once

_ROW_TRIALS = 4


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The contents of a row beside its tokens; a run learns them from its data."""

    embedding_width: int  # E
    targets: int | None  # M; None is half of T
    segments: int  # S
    items: tuple[int, int] | None = None  # of a catalogue, how many, and the width of their vectors
    named: int = 0  # N, items that a conversation names


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step on one device; bytes unless named otherwise."""

    arguments: int = 0
    temporary: int = 0
    peak: int = 0
    """Arguments, results that take nobody's place, temporary memory and the program itself."""
    flops: float = 0.0
    traffic: int = 0
    """Read from and written to memory."""
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Kind -> times, and bytes that come to a device."""
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    """Name of a kernel that was written by hand -> times that it runs."""
    loops: int = 0
    unknown_loops: int = 0
    """Those of which the program does not say how often they run: what is in them counts once."""

    @property
    def received(self) -> int:
        return sum(nbytes for _, nbytes in self.collectives.values())

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Gives what each part takes at the chip's peak; the longest is the roofline's best step time."""
        parts = {"compute": (self.flops, chip.flops), "memory": (self.traffic, chip.bandwidth)}
        parts["interconnect"] = (self.received, chip.interconnect)
        return {name: amount / peak for name, (amount, peak) in parts.items() if peak}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology."""

    topology: Topology
    mesh: dict[str, int]
    rows: int
    """B, over all devices."""
    logits: int
    """Of the loss, that a device holds at once."""
    steps: dict[str, Cost]
    """`train`, and `evaluate` where that was compiled."""

    @property
    def rows_per_device(self) -> float:
        return self.rows / len(self.topology.devices)

    @property
    def peak(self) -> int:
        return max(cost.peak for cost in self.steps.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.topology.chip.memory

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        steps = {}
        for name, cost in self.steps.items():
            collectives = {kind: dict(zip(("count", "bytes"), c, strict=True)) for kind, c in cost.collectives.items()}
            seconds = cost.seconds(self.topology.chip)
            steps[name] = dataclasses.asdict(cost) | {"collectives": collectives, "collective_bytes": cost.received}
            steps[name] |= {"intensity": cost.flops / max(cost.traffic, 1), "seconds": seconds}
            steps[name]["best_seconds"] = max(seconds.values(), default=None)
        return {
            "topology": self.topology.name,
            "devices": len(self.topology.devices),
            "device_memory": self.topology.chip.memory,
            "mesh": self.mesh,
            "rows": self.rows,
            "rows_per_device": self.rows_per_device,
            "logits_at_once": self.logits,
            "fits": self.fits,
            "steps": steps,
        }


def read_backbone(config: Config) -> DecoderConfig:
    """The backbone's shapes; of a hub id that ships in `configs/backbones`, without the hub.

    Raises:
      UserError: no such backbone, or its config.json is refused.
    """
    config.validate()
    backbone = config.backbone
    return read_config(weights.find_config(backbone.path, backbone.revision), backbone.ignored_keys)


def abstract_batch(config: Config, shape: RowShape, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    targets = config.data.seq_len // 2 if shape.targets is None else shape.targets
    budget = Budget(config.data.seq_len, targets, shape.segments, shape.named)
    return batch_shapes(mesh, config.train.rows, budget, shape.embedding_width)


def make_plan(
    config: Config, decoder: DecoderConfig, topology: Topology, shape: RowShape, evaluation: bool = True
) -> Plan:
    """Compiles the train step and the evaluation step.

    Args:
      evaluation: whether the latter, too; it is the train step's forward pass, and takes less of everything.

    Raises:
      UserError: mesh, rows or `train.trainable` do not fit the devices.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    if config.train.rows % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(f"train.rows={config.train.rows} does not divide by mesh.data x mesh.fsdp; use a multiple")
    batch = abstract_batch(config, shape, mesh)
    model = abstract_model(config, decoder, shape.embedding_width, mesh, topology.memory, shape.items)
    state, (_, frozen) = abstract_state(model, config.train), split(model.params, model.mask)
    steps: dict[str, tuple[Any, tuple]] = {"train": (jit_train_step(model, config.train), (state, frozen, batch))}
    if evaluation:
        measured = "item_nll" if shape.items else ""  # as `e2p train` has it
        steps["evaluate"] = jit_eval_step(model, items=measured), (state.trainable, frozen, batch)
    with jax.set_mesh(mesh), jax.default_device(topology.devices[0]):  # of which tokamax asks what it can do
        costs = {name: _compile(step, arguments) for name, (step, arguments) in steps.items()}
    at_once = logits_at_once(config.train, topology.memory)
    return Plan(topology, dict(mesh.shape), config.train.rows, at_once, costs)


def _needed(refusal: str, arguments: int) -> int | None:
    """Bytes that libtpu says a program would take when it refuses one that does not fit: of all of it, or of its
    temporaries where they alone are too many.
    """
    said = re.search(r"RESOURCE_EXHAUSTED.*?(Used |HLO temporaries \()([\d.]+)([KMGT])", refusal, re.DOTALL)
    if said is None:
        return None
    return int(float(said[2]) * 1024 ** " KMGT".index(said[3])) + (0 if said[1] == "Used " else arguments)


def _compile(step: Any, arguments: tuple) -> Cost:
    lowered = step.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error), bytes_per_device(arguments))
        if needed is None:
            raise
        return Cost(peak=needed)
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    collectives: Counter[str] = Counter()
    received: Counter[str] = Counter()
    for collective in program.collectives:
        collectives[collective.kind] += collective.times
        received[collective.kind] += collective.received
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Cost(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes + memory.temp_size_in_bytes + results + memory.generated_code_size_in_bytes,
        flops=program.flops,
        traffic=program.hbm_bytes,
        collectives={kind: (count, received[kind]) for kind, count in sorted(collectives.items())},
        kernels=program.kernels,
        loops=program.loops,
        unknown_loops=len(program.unknown_loops),
    )


def largest_rows(plan: Plan, compile_rows: Callable[[int], Plan]) -> Plan | None:
    """The plan with the most rows found to fit on this mesh; None where one row a row shard does not.

    Memory grows about linearly with rows: the line through two plans says where it ends, compiling there how far off
    that was, a few times.
    """
    unit, memory = plan.mesh["data"] * plan.mesh["fsdp"], plan.topology.chip.memory
    best = plan if plan.rows == unit else compile_rows(unit)
    if not best.fits:
        return None
    other = compile_rows(2 * unit) if plan.rows == unit else plan
    for _ in range(_ROW_TRIALS):
        if other.fits and other.rows > best.rows:
            best, other = other, best
        a_row = (other.peak - best.peak) / (other.rows - best.rows)
        rows = best.rows + int((memory - best.peak) / max(a_row, 1)) // unit * unit
        if rows <= best.rows or (rows >= other.rows > best.rows):
            break
        other = compile_rows(rows)
    return max((p for p in (best, other) if p.fits), key=lambda p: p.rows)


def other_meshes(config: Config, decoder: DecoderConfig, topology: Topology, shape: RowShape) -> Iterator[MeshConfig]:
    """Meshes over the same devices whose arguments alone fit, and that the rows and heads divide by."""
    count = len(topology.devices)
    for tensor in (n for n in range(1, count + 1) if count % n == 0 and decoder.num_kv_heads % n == 0):
        for fsdp in (n for n in range(1, count // tensor + 1) if count // tensor % n == 0):
            sizes = MeshConfig(count // tensor // fsdp, fsdp, tensor)
            if config.train.rows % (sizes.data * sizes.fsdp):
                continue
            mesh, width = make_mesh(sizes, topology.devices), shape.embedding_width
            model = abstract_model(config, decoder, width, mesh, topology.memory, shape.items)
            if bytes_per_device((model.params, abstract_state(model, config.train))) < topology.chip.memory:
                yield sizes
