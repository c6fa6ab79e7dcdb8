"""What a training step costs as one thing grows: row length, rows, depth, users a row, vocabulary; and what it should.

    python benchmarks/growth.py --out docs/growth.svg --json-out growth.json

A random Llama of width 512 on full rows of random tokens, every second one a target. What is expected is arithmetic:
the FLOPs that the mathematics needs, at the median rate of the curve's points. What does not grow is 2 rows of 512
tokens, 4 users a row, 4 layers, 16,384 words. The slope of a curve is that of a line through its logarithms: 1 where
twice of it costs twice as much.
"""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import arithmetic
import made_up
import measure
import numpy as np
import rich.console
import rich.table
import tyro


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured."""

    length: int = 512
    rows: int = 2
    layers: int = 4
    users: int = 4  # a row
    vocabulary: int = 16384


CURVES: dict[str, tuple[Sequence[int], Callable[[int], Point]]] = {  # what grows: its values, and the point of each
    "tokens a row, 128 an example": ((256, 512, 1024, 2048, 4096), lambda n: Point(length=n, users=n // 128)),
    "tokens a row, one example": ((256, 512, 1024, 2048, 4096), lambda n: Point(length=n, users=1)),
    "rows": ((1, 2, 4, 8, 16), lambda n: Point(rows=n)),
    "layers": ((1, 2, 4, 8, 16), lambda n: Point(layers=n)),
    "users a row of 2,048 tokens": ((1, 2, 4, 8, 16, 32), lambda n: Point(length=2048, users=n)),
    "vocabulary": ((4096, 16384, 32768, 65536, 131072), lambda n: Point(vocabulary=n)),
}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def curve(name: str, repeats: int, clock: measure.Clock) -> dict[str, Any]:
    """One curve as JSON values: medians, fastest and slowest round, and what is expected, in seconds."""
    values, point_at = CURVES[name]
    contenders, needed = [], []
    for point in map(point_at, values):
        config = made_up.llama(512, 1376, point.layers, 8, point.vocabulary)
        batch = made_up.random_rows(point.rows, point.length, point.users, point.vocabulary)
        step = made_up.Step(made_up.random_model(config), batch)
        contenders.append(measure.Contender(str(point), step, 1.0))
        needed.append(arithmetic.needed_flops(config, batch))
    measure.take_turns(contenders, repeats, clock)
    medians = [float(np.median(contender.seconds)) for contender in contenders]
    expected = np.median(np.divide(medians, needed)) * np.asarray(needed)
    return {
        "grows": name,
        "values": list(values),
        "seconds": medians,
        "fastest": [min(contender.seconds) for contender in contenders],
        "slowest": [max(contender.seconds) for contender in contenders],
        "expected": expected.tolist(),
        "slope": slope(values, medians),
        "expected_slope": slope(values, expected),
    }


def show(figures: dict[str, Any]) -> None:
    title = f"{figures['grows']}: slope {figures['slope']:.2f}, expected {figures['expected_slope']:.2f}"
    table = rich.table.Table("", "ms", "fastest to slowest round", "expected", "of expected", title=title)
    columns = [figures[name] for name in ("values", "seconds", "fastest", "slowest", "expected")]
    for value, seconds, fastest, slowest, expected in zip(*columns, strict=True):
        spread = f"{1e3 * fastest:,.0f} to {1e3 * slowest:,.0f}"
        row = [f"{1e3 * seconds:,.0f}", spread, f"{1e3 * expected:,.0f}", f"{seconds / expected:.2f}x"]
        table.add_row(f"{value:,}", *row)
    rich.console.Console(width=100).print(table)


def draw(curves: Sequence[dict[str, Any]], out: Path) -> None:
    """A panel a curve: dots with whiskers over what is expected, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    from e2p_jax.report.figures import COLOURS, INK, STYLE

    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
        for axes, c in zip(grid.flat, curves, strict=False):
            milliseconds = 1e3 * np.asarray(c["seconds"])
            spread = np.abs(1e3 * np.asarray([c["fastest"], c["slowest"]]) - milliseconds)
            axes.plot(c["values"], 1e3 * np.asarray(c["expected"]), color=INK, linewidth=1.2, label="expected")
            axes.errorbar(c["values"], milliseconds, spread, fmt="o", color=COLOURS[0], markersize=5, label="measured")
            axes.set(xscale="log", yscale="log", xlabel=c["grows"])
            axes.set_xticks(c["values"], [f"{value:,}" for value in c["values"]], rotation=30, fontsize=8)
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.set_ylim(0.5 * min(milliseconds), 2 * max(milliseconds))
            axes.set_title(f"slope {c['slope']:.2f}, expected {c['expected_slope']:.2f}", fontsize=9, color=INK)
        for axes in grid[:, 0]:
            axes.set_ylabel("ms per step")
        grid[0, 0].legend(fontsize=8)
        figure.savefig(out, transparent=True, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
        plt.close(figure)


def main(
    grows: tuple[str, ...] = tuple(CURVES),
    repeats: int = 5,
    clock: measure.Clock = "wall",
    out: Path | None = None,
    json_out: Path | None = None,
) -> None:
    """Measures.

    Args:
      grows: Which curves; all by default.
      repeats: Rounds of all points of a curve.
      clock: wall, or cpu: this process's processor time, for a busy machine (run it under `taskset -c 0`).
      out: File for the plots, .svg or .png.
      json_out: File for the figures.
    """
    curves = []
    for name in grows:
        curves.append(curve(name, repeats, clock))
        show(curves[-1])
        gc.collect()
    if out:
        draw(curves, out)
    measure.write_json(json_out, {"curves": curves})


if __name__ == "__main__":
    tyro.cli(main)
