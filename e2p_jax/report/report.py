"""`e2p report`: one self-contained page, its pictures, and its numbers as CSV."""

import csv
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from etils import epath

from e2p_jax.evaluate.evaluation import BASELINES, share_text, worst_text
from e2p_jax.evaluate.measures import MEASURES, interval_text, p_text, value_text
from e2p_jax.files import refuse_other_files, replace_directory
from e2p_jax.report.collect import Collected, collect
from e2p_jax.report.figures import Figures
from e2p_jax.terminal import printable

PAGE = Path(__file__).parent / "page.html.jinja"
COLUMNS = ("value", "low", "high")
SHOWN = 600  # characters of a text on the page; the CSV files have all
# How spreadsheets know a formula, in wide characters too, and behind what they skip.
_FORMULA = re.compile(r"[\s\0]*[=+\-@＝＋－＠]|[\t\r\n]")


def write_report(paths: Sequence[epath.PathLike], out: Path) -> Path:
    """Measures, draws and writes.

    Args:
      paths: run directories, or those of comparisons.
      out: a directory, new or an earlier report.

    Returns:
      The page.

    Raises:
      UserError: what `collect` refuses, or `out` holds something else.
    """
    refuse_other_files(out, lambda name: name.endswith((".html", ".png", ".csv")))
    found = collect(paths)
    with replace_directory(out) as temporary:
        figures = Figures(temporary)
        _draw(figures, found)
        _write_csvs(temporary, found)
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_shown
        )
        texts = {f.__name__: f for f in (value_text, interval_text, p_text, share_text, worst_text)}
        environment.globals.update(SHOWN=SHOWN, MEASURES=MEASURES, **texts)
        page = environment.from_string(PAGE.read_text(encoding="utf-8")).render(
            found=found,
            svgs=figures.svgs,
            tables=[table for source in found.sources for table in _tables(source.name, source.splits)],
            tiles=_tiles(found),
        )
        (temporary / "index.html").write_text(page, encoding="utf-8", errors="replace")
    return out / "index.html"


def _draw(figures: Figures, found: Collected) -> None:
    for place, split in enumerate(split for source in found.sources for split in source.splits):
        for baseline in BASELINES:
            rows = [
                (name, apart["mean"], apart["low"], apart["high"])
                for name, row in split["conditions"].items()
                if (apart := row.get(f"minus_{baseline}"))
            ]
            if rows:
                figures.conditions(f"conditions-{place}-{baseline}", rows, baseline)
        if split.get("share"):
            figures.share(f"share-{place}", split["share"])
        if split.get("beyond_none"):
            figures.beyond(f"beyond-{place}", split["beyond_none"])
    figures.learning(found.learning, found.training)
    figures.robustness(found.robustness)
    figures.cost(found.costs)
    figures.users(found.users)


def _tables(source: str, splits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the page: a table of NLL and differences a split, and one of the further measures."""
    tables = []
    for split in splits:
        columns = {name: row["measures"] for name, row in split["conditions"].items()} | split["recommenders"]
        names = {name: 0 for measures in columns.values() for name in measures}
        further = [name for name in names if name not in ("nll_per_target", "word_perplexity")]
        tables.append({"source": source, **split, "columns": columns, "further": further})
    return tables


def _tiles(found: Collected) -> list[tuple[str, str, str]]:
    """Picks the few numbers that matter most: value, what it is, and its interval or what it is compared with."""
    tiles = []
    rows = found.sources[0].splits[0]["conditions"]
    texts = {
        "none": "nats per target, saved by the soft token",
        "shuffled": "nats per target, better than another user's",
    }
    for baseline, text in texts.items():
        apart = rows.get("e2p", {}).get(f"minus_{baseline}")
        if apart:
            p = p_text(apart["p"], apart.get("p_least", 0))
            interval = f"95 %: {-apart['high']:.4f} to {-apart['low']:.4f}, p {p}"
            tiles.append((f"{-apart['mean']:.4f}", text, interval))
    tokens = {cost.condition: cost.prompt_tokens for cost in found.costs}
    spent = tokens["e2p"] - tokens["none"]
    spelled = tokens["text"] - tokens["none"]
    tiles.append((f"{spent:.0f}", "prompt tokens per user", f"{spelled:.0f} with the context as text"))
    size, parameters = found.bytes["soft tokens"], found.trained[found.run].trainable
    tiles.append((f"{size:,.0f}", "bytes per user, as soft tokens", f"{parameters:,} parameters"))
    return tiles


def _write_csvs(out: Path, found: Collected) -> None:
    def write(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        with (out / name).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([text_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)

    parts = ("mean", "low", "high", "p")
    apart = [f"minus_{baseline}_{part}" for baseline in BASELINES for part in parts]
    rows = []
    for source in found.sources:
        for split in source.splits:
            rows_of = {name: row["measures"] for name, row in split["conditions"].items()} | split["recommenders"]
            for condition, measures in rows_of.items():
                for measure, entry in measures.items():
                    numbers = [entry.get(column, "") for column in COLUMNS]
                    differences = [entry.get(f"minus_{b}", {}).get(part, "") for b in BASELINES for part in parts]
                    rows.append([source.name, split["split"], condition, measure, *numbers, *differences])
    write("share.csv", ["source", "split", "part", *COLUMNS], _share_rows(found))
    write("beyond.csv", ["source", "split", "condition", "percentile", "user_id", "nats"], _beyond_rows(found))
    write("conditions.csv", ["source", "split", "condition", "measure", *COLUMNS, *apart], rows)
    curves = [(name, step, nll) for name, points in found.learning.items() for step, nll in points]
    write("learning.csv", ["run", "step", "nll"], curves)
    for name, items in (("robustness.csv", found.robustness), ("cost.csv", found.costs)):
        write(name, [f.name for f in dataclasses.fields(items[0])], [dataclasses.astuple(item) for item in items])
    people = zip(found.users.records, found.users.places.tolist(), found.users.nearest, strict=True)
    write(
        "users.csv",
        ["user_id", "x", "y", "nearest", "context"],
        [(record.user_id, *place, " ".join(near), " ".join(record.context)) for record, place, near in people],
    )
    answers = [(p.user_id, prompt, a) for p in found.people for prompt, a in zip(found.prompts, p.answers, strict=True)]
    answers += [("", prompt, answer) for prompt, answer in zip(found.prompts, found.without, strict=True)]
    write("answers.csv", ["user_id", "prompt", "answer"], answers)


def _share_rows(found: Collected) -> Iterable[Sequence[Any]]:
    for source in found.sources:
        for split in source.splits:
            for part, entry in (split.get("share") or {}).items():
                yield [source.name, split["split"], part, *(entry[column] if entry else "" for column in COLUMNS)]


def _beyond_rows(found: Collected) -> Iterable[Sequence[Any]]:
    """The percentiles over users, then the worst ones by id."""
    for source in found.sources:
        for split in source.splits:
            for condition, beyond in split.get("beyond_none", {}).items():
                where = (source.name, split["split"], condition)
                yield from ((*where, percent, "", nats) for percent, nats in enumerate(beyond["percentiles"]))
                yield from ((*where, "", user["user_id"], user["nats"]) for user in beyond["worst"])


def _shown(value: Any) -> Any:
    """Makes text of data fit for the page: with escapes for what would turn around the page's own words beside it."""
    is_data = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
    return printable(value, lines=True) if is_data else value


def text_cell(text: str) -> str:
    """The text, with a ' in front where a spreadsheet would take it for a formula and run it."""
    return f"'{text}" if _FORMULA.match(text) else text
