"""Figures: a PNG for elsewhere, and an SVG for the page whose ink takes the colour of the text around it."""

import io
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from e2p_jax.evaluate.cost import Cost
from e2p_jax.evaluate.robustness import DISTURBANCES, Point
from e2p_jax.evaluate.users import UserMap
from e2p_jax.files import write_bytes
from e2p_jax.report.collect import Curves, curves
from e2p_jax.terminal import printable
from e2p_jax.train.beyond import BREAKS

INK = "#707172"  # stands for the text's colour until the page is made
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#ec4899")
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "e2p",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "legend.frameon": False,
}


class Figures:
    """Draws into one directory; remembers what the page shows."""

    def __init__(self, out: Path):
        import matplotlib

        matplotlib.use("Agg")
        self.out = out
        self.svgs: dict[str, str] = {}

    def _axes(self, rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.4, 3.6)) -> tuple[Any, Any]:
        import matplotlib.pyplot as plt

        with plt.rc_context(STYLE):
            return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)

    def _save(self, figure: Any, name: str) -> None:
        import matplotlib.pyplot as plt

        with plt.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font has it, or shows a box
            figure.savefig(self.out / f"{name}.png", dpi=150, facecolor="white")
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", svg)  # several pictures stand in one page
        self.svgs[name] = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)

    def conditions(self, name: str, rows: Sequence[tuple[str, float, float, float]], baseline: str) -> None:
        """Dots with whiskers: condition, difference, low, high."""
        figure, grid = self._axes(size=(5.4, 0.9 + 0.34 * len(rows)))
        axes = grid[0, 0]
        axes.axvline(0, color=INK, linewidth=1)
        for place, (_, mean, low, high) in enumerate(rows):
            colour = COLOURS[2] if high < 0 else COLOURS[4] if low > 0 else INK
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
            axes.plot(mean, place, "o", color=colour, markersize=6)
        axes.set_yticks(range(len(rows)), [_plain(condition, 20) for condition, *_ in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"NLL per target (nats) minus {baseline} (left is better)")
        self._save(figure, name)

    def beyond(self, name: str, by_condition: dict[str, dict[str, Any]]) -> None:
        """Users in the order of what a token costs them, a curve a condition, the worst user named."""
        figure, grid = self._axes()
        axes = grid[0, 0]
        axes.axhline(0, color=INK, linewidth=1)
        axes.axhline(BREAKS, color=COLOURS[4], linestyle="--", linewidth=1.2, label=f"above {BREAKS}: breaks the model")
        for number, (condition, found) in enumerate(by_condition.items()):
            worst = found["worst"][0]
            label = f"{condition}, worst: {worst['user_id']}"
            axes.plot(found["percentiles"], color=COLOURS[number % 8], label=f"{_plain(label)} {worst['nats']:+.2f}")
            axes.plot(100, worst["nats"], "o", color=COLOURS[number % 8], markersize=5)
        axes.set(xlabel="users (%), in order", ylabel="nats per target beyond none")
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        self._save(figure, name)

    def share(self, name: str, share: dict[str, dict[str, float] | None]) -> None:
        """Bars with whiskers: what the persona is worth as text, and what the soft token carries of it."""
        figure, grid = self._axes(size=(5.4, 1.9))
        axes, labels = grid[0, 0], {"whole": "persona as text", "gain": "soft token"}
        for place, name_of in enumerate(labels):
            found = share[name_of] or {}
            axes.barh(place, found["value"], color=COLOURS[2 * place], alpha=0.55, height=0.55)
            axes.plot([found["low"], found["high"]], [place, place], color=INK, linewidth=2)
        text = "no share: what the text is worth is not told from nothing"
        if part := share["share"]:
            value, low, high = (f"{100 * part[name]:.0f} %" for name in ("value", "low", "high"))
            text = f"the soft token carries {value} [{low}, {high}]"
        axes.set_title(text, fontsize=9, color=INK)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(2), list(labels.values()))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("nats per target better than another user's")
        self._save(figure, name)

    def learning(self, curves: Curves, training: Curves) -> None:
        """Held-out NLL by step, and the training loss behind it."""
        figure, grid = self._axes()
        axes = grid[0, 0]
        for number, (name, points) in enumerate(curves.items()):
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[number % 8], markersize=3, label=_plain(name))
        for number, points in enumerate(training.values()):
            axes.plot(*zip(*points, strict=True), color=COLOURS[number % 8], alpha=0.25, linewidth=1, zorder=0)
        axes.set(xlabel="step", ylabel="NLL per target (nats)")
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        self._save(figure, "learning")

    def robustness(self, points: Sequence[Point]) -> None:
        """A panel for every disturbance, with the levels of no prefix and of a cold start."""
        figure, grid = self._axes(2, 2, (5.4, 4.8))
        fixed = {p.disturbance: p for p in points if p.disturbance not in DISTURBANCES}
        for axes, (name, (label, _, _)) in zip(grid.flat, DISTURBANCES.items(), strict=True):
            curve = sorted((p for p in points if p.disturbance == name), key=lambda p: p.level)
            levels = [p.level for p in curve]
            axes.fill_between(levels, [p.low for p in curve], [p.high for p in curve], color=COLOURS[0], alpha=0.18)
            axes.plot(levels, [p.nll for p in curve], "o-", color=COLOURS[0], markersize=4)
            axes.axhline(fixed["none"].nll, color=COLOURS[4], linestyle="--", linewidth=1.2, label="no prefix")
            axes.axhline(fixed["cold start"].nll, color=COLOURS[1], linestyle=":", linewidth=1.6, label="cold start")
            axes.set_xlabel(label, fontsize=9)
        grid[0, 0].set_ylabel("NLL per target (nats)")
        grid[1, 0].set_ylabel("NLL per target (nats)")
        grid[0, 0].legend(fontsize=8, frameon=False, labelcolor=INK)
        self._save(figure, "robustness")

    def cost(self, costs: Sequence[Cost]) -> None:
        """Bars by condition."""
        figure, grid = self._axes(1, 3, (5.4, 0.9 + 0.42 * len(costs)))
        panels = [
            ("prompt tokens", [c.prompt_tokens for c in costs], "{:.0f}"),
            ("first token, ms", [c.first_token_ms for c in costs], "{:.1f}"),
            ("tokens per second", [c.tokens_per_second for c in costs], "{:.0f}"),
        ]
        for axes, (label, values, form) in zip(grid.flat, panels, strict=True):
            bars = axes.barh(range(len(costs)), values, color=[COLOURS[n % 8] for n in range(len(costs))], height=0.6)
            axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8, color=INK)
            axes.set_xlim(0, 1.35 * max(values))
            axes.grid(axis="y", visible=False)
            axes.locator_params(axis="x", nbins=3)
            axes.set_xlabel(label, fontsize=9)
        grid[0, 0].set_yticks(range(len(costs)), [c.condition for c in costs])
        grid[0, 0].invert_yaxis()  # the others share it
        self._save(figure, "cost")

    def users(self, found: UserMap) -> None:
        """Every user a dot; those who lie apart are named by the word nearest to their soft token."""
        figure, grid = self._axes(size=(5.4, 4.4))
        axes = grid[0, 0]
        axes.scatter(*found.places.T, s=12, color=COLOURS[0], alpha=0.5, linewidths=0)
        for number, place in enumerate(found.apart):
            x, y = found.places[place]
            colour = COLOURS[(number + 1) % 8]
            axes.scatter([x], [y], s=60, color=colour, zorder=3)
            words = " · ".join(_plain(word, 20) for word in found.nearest[place][:2])
            axes.annotate(words, (x, y), xytext=(7, 4), textcoords="offset points", fontsize=9, color=INK)
        axes.margins(0.18, 0.12)
        axes.set(xlabel="first principal component", ylabel="second", xticks=[], yticks=[])
        self._save(figure, "users")


def draw_loss(run: epath.Path) -> epath.Path:
    """Writes a run's learning curve, `report/loss.png`."""
    path = run / "report" / "loss.png"
    with tempfile.TemporaryDirectory() as place:
        Figures(Path(place)).learning(*curves({run.name: run}))
        write_bytes(path, (Path(place) / "learning.png").read_bytes())
    return path


def _plain(text: str, most: int = 60) -> str:
    """A label: short enough to leave room for the picture, without what matplotlib takes for mathematics.

    A label that begins with an underscore would be left out.
    """
    cut = text if len(text) <= most else f"{text[:most]}..."
    return (" " if text.startswith("_") else "") + printable(cut).replace("$", r"\$")
