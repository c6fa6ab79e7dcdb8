"""Side by side: contenders take turns in one process, so that a busy machine slows all of them alike."""

import dataclasses
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import rich.console
import rich.table

Clock = Literal["wall", "cpu"]


@dataclasses.dataclass
class Contender:
    """Something timed: `run` does the work and returns when it is done; `amount` is what one run gets done."""

    name: str
    run: Callable[[], Any]
    amount: float
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def rate(self) -> float:
        """Amount a second, of the median run."""
        return self.amount / statistics.median(self.seconds)

    def figures(self) -> dict[str, Any]:
        low, high = min(self.seconds), max(self.seconds)
        return {
            "name": self.name,
            "amount": self.amount,
            "per_second": self.rate,
            "median_s": statistics.median(self.seconds),
            "slowest_per_second": self.amount / high,
            "fastest_per_second": self.amount / low,
            "runs": len(self.seconds),
        }


def take_turns(contenders: Sequence[Contender], repeats: int, clock: Clock = "wall") -> None:
    """Runs each once to warm up (and compile), then `repeats` rounds of all of them.

    Each round goes in an order of its own: who runs right after one that held much memory is slower. The clock `cpu`
    counts this process's processor time: on one core (`taskset -c 0`), where nobody waits for threads, it is what the
    work costs however busy the machine is.
    """
    now = time.perf_counter if clock == "wall" else time.process_time
    for contender in contenders:
        contender.run()
    orders = random.Random(0)
    for _ in range(repeats):
        for contender in orders.sample(contenders, len(contenders)):
            started = now()
            contender.run()
            contender.seconds.append(now() - started)


def paired_ratio(ours: Contender, other: Contender) -> tuple[float, float, float]:
    """How many times `other`'s rate ours is: the median over rounds, the least and the greatest."""
    scale = ours.amount / other.amount
    ratios = [scale * b / a for a, b in zip(ours.seconds, other.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def report(title: str, unit: str, ours: Contender, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Prints a table of rates, and of ours as a multiple of each; returns the same as JSON values."""
    table = rich.table.Table(
        "", f"{unit}/s", "slowest to fastest round", "ours is", "slowest to fastest round", title=title
    )
    rows = []
    for contender in contenders:
        figures = contender.figures()
        middle, low, high = paired_ratio(ours, contender)
        figures |= {"ours_is": middle, "ours_is_least": low, "ours_is_most": high}
        rates = f"{figures['slowest_per_second']:,.1f} to {figures['fastest_per_second']:,.1f}"
        table.add_row(contender.name, f"{contender.rate:,.1f}", rates, f"{middle:.2f}x", f"{low:.2f}x to {high:.2f}x")
        rows.append(figures)
    rich.console.Console(width=120).print(table)
    return {"title": title, "unit": unit, "contenders": rows}


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """With what the figures depend on beside them: versions, devices, processor."""
    if path is None:
        return
    import jax

    here = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    here |= {"machine": platform.machine(), "python": platform.python_version()}
    path.write_text(json.dumps({**figures, "here": here}, indent=2) + "\n")
