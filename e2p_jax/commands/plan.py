"""`e2p plan`."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import rich.table

from e2p_jax.commands.common import Json, Named, Overrides
from e2p_jax.config import Config
from e2p_jax.errors import UsageError, UserError
from e2p_jax.terminal import Console, say

if TYPE_CHECKING:
    from e2p_jax.plan.plan import Plan, RowShape


def plan_command(_: str, defaults: Config) -> Callable[..., None]:
    """`plan` with the named config's values as the defaults of its flags."""

    def command(
        config: Named,
        /,
        topology: str,
        embedding_width: int = 768,
        targets: int | None = None,
        segments: int = 16,
        items: int = 0,
        item_width: int = 64,
        items_named: int = 16,
        suggest: bool = True,
        as_json: Json = False,
        overrides: Overrides = defaults,
    ) -> None:
        """Compiles the train and evaluation steps for devices that are not here; exit 1 where they do not fit.

        Of the backbone, config.json is enough.

        Args:
          topology: v5e:4x4, v5p:2x4x4, v6e:8x8, tpu7x:2x2x1, of two slices v5e:4x4:2; h100:8, h200:8, a100:8, b200:8,
            of two hosts h100:2x8; or cpu:N.
          embedding_width: E, of the user vectors; this and the next five a run learns from its data.
          targets: M, targets per row. Default: half of data.seq_len.
          segments: S, conversations per row.
          items: I, of the catalogue of `data.items`; 0 is a run without one.
          item_width: G, of the items' vectors.
          items_named: N, items that a conversation names at most.
          suggest: Compile for more rows and other meshes too: about a minute for each.
        """
        from e2p_jax.plan.plan import RowShape

        if min(embedding_width, segments, item_width, items_named, 1 if targets is None else targets) < 1 or items < 0:
            raise UsageError("--embedding-width, --targets, --segments and what --items says must be positive")
        catalogue = ((items, item_width), items_named) if items else ()
        _plan(overrides, topology, RowShape(embedding_width, targets, segments, *catalogue), suggest, as_json)

    return command


def _plan(config: Config, topology: str, shape: "RowShape", suggest: bool, as_json: bool) -> None:
    import dataclasses

    from e2p_jax.plan import plan as planning
    from e2p_jax.plan.topology import find_topology

    place = find_topology(topology)
    decoder = planning.read_backbone(config)

    def compile_for(config: Config, evaluation: bool = False) -> "Plan":
        plan = planning.make_plan(config, decoder, place, shape, evaluation)
        say(f"{_mesh(plan)}, {plan.rows} rows: {_mib(plan.peak)} of {_mib(place.chip.memory)} MiB per device")
        return plan

    plan = compile_for(config, evaluation=True)
    most = fewest = None
    if suggest:
        most = planning.largest_rows(plan, lambda rows: compile_for(config.change(train={"rows": rows})))
        meshes = planning.other_meshes(config, decoder, place, shape)
        plans = [compile_for(dataclasses.replace(config, mesh=mesh)) for mesh in meshes]
        fewest = min((p for p in plans if p.fits), key=lambda p: p.steps["train"].received, default=None)
    if as_json:
        values = plan.to_dict()
        if suggest:
            values["largest_rows"] = most and most.to_dict()
            values["fewest_collective_bytes"] = fewest and fewest.to_dict()
        print(json.dumps(values, indent=2))
    else:
        console = Console(width=None if Console().is_terminal else 120)
        console.print(
            f"{topology}, {_mesh(plan)}, {plan.rows} rows ({plan.rows_per_device:g} per device)", highlight=False
        )
        console.print(_table(plan))
        console.print(f"logits of the loss at once: {plan.logits:,} ({_mib(4 * plan.logits)} MiB)", highlight=False)
        if suggest:
            console.print(_advice(plan, most, fewest), highlight=False)
    if not plan.fits:
        raise UserError(
            f"{plan.rows} rows of {config.data.seq_len} tokens take {_mib(plan.peak)} MiB per device, and "
            f"{topology} has {_mib(place.chip.memory)}; lower train.rows, split over more devices with mesh.fsdp, or "
            "set backbone.remat"
        )


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.1f}"


def _mesh(plan: "Plan") -> str:
    return " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())


def _table(plan: "Plan") -> rich.table.Table:
    chip = plan.topology.chip
    table = rich.table.Table()
    table.add_column("per device and step")
    for name in plan.steps:
        table.add_column(name, justify="right")

    def add(label: str, value: Callable[[Any], str]) -> None:
        table.add_row(label, *(value(cost) for cost in plan.steps.values()))

    add("arguments, MiB", lambda c: _mib(c.arguments))
    add("temporary, MiB", lambda c: _mib(c.temporary))
    add(f"peak, MiB of {_mib(chip.memory)}", lambda c: _mib(c.peak))
    add("matrix TFLOP", lambda c: f"{c.flops / 1e12:,.2f}")
    add("memory traffic, MiB", lambda c: _mib(c.traffic))
    add("FLOP per byte", lambda c: f"{c.flops / max(c.traffic, 1):,.0f}")
    for kind in sorted({kind for cost in plan.steps.values() for kind in cost.collectives}):
        add(f"{kind}, times and MiB", lambda c, k=kind: "{} x  {}".format(*_collective(c, k)))  # type: ignore[misc]
    for kernel in sorted({kernel for cost in plan.steps.values() for kernel in cost.kernels}):
        add(f"{kernel}, times", lambda c, k=kernel: str(c.kernels.get(k, 0)))  # type: ignore[misc]
    add("loops, and of unknown length", lambda c: f"{c.loops}, {c.unknown_loops}")
    for part in ("compute", "memory", "interconnect"):
        if part in plan.steps["train"].seconds(chip):
            add(f"ms at the peak of {part}", lambda c, p=part: f"{1000 * c.seconds(chip)[p]:,.1f}")  # type: ignore[misc]
    if chip.flops:
        add("best step time, ms", lambda c: f"{1000 * max(c.seconds(chip).values()):,.1f}")
    return table


def _collective(cost: Any, kind: str) -> tuple[int, str]:
    times, nbytes = cost.collectives.get(kind, (0, 0))
    return times, _mib(nbytes)


def _advice(plan: "Plan", most: "Plan | None", fewest: "Plan | None") -> str:
    lines = ["not one row per device fits on this mesh"]
    if most:
        lines = [f"most rows that fit on this mesh: --train.rows {most.rows} ({_mib(most.peak)} MiB)"]
    if fewest:
        flags = " ".join(f"--mesh.{axis} {size}" for axis, size in fewest.mesh.items())
        received = fewest.steps["train"].received
        lines.append(f"fewest collective bytes at {plan.rows} rows: {flags} ({_mib(received)} MiB per device)")
    return "\n".join(lines)
