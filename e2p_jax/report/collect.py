"""Everything a report shows, measured or read from run directories."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from e2p_jax.config import Condition, from_json
from e2p_jax.errors import UserError
from e2p_jax.evaluate.cost import Cost, Training, bytes_per_user, serving_cost, training_cost
from e2p_jax.evaluate.evaluation import read_splits
from e2p_jax.evaluate.robustness import Point, robustness
from e2p_jax.evaluate.users import UserMap, ask, map_users
from e2p_jax.files import in_bucket, run_directory
from e2p_jax.json_files import read_object
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.run import Run, open_run

Curves = dict[str, list[tuple[float, float]]]  # (step, nats per target) by name
PROMPTS = ("hi , what do you do for fun ?", "what do you like ?")
COSTED: tuple[Condition, ...] = ("none", "e2p", "text")


@dataclasses.dataclass(frozen=True)
class Source:
    """A run, or a comparison of several."""

    name: str
    runs: dict[str, epath.Path]
    splits: list[dict[str, Any]]  # of report/evaluation.json, with every measure


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody who answers the prompts."""

    user_id: str
    context: tuple[str, ...]
    nearest: list[str]
    answers: list[str]


@dataclasses.dataclass(frozen=True)
class Collected:
    """All that the page, the figures and the CSV files are made of."""

    sources: list[Source]
    learning: Curves  # held-out NLL by step, by run and split
    training: Curves  # training loss by step, by run
    trained: dict[str, Training]
    run: str  # the one that the rest is of
    split: str
    robustness: list[Point]
    costs: list[Cost]
    bytes: dict[str, float]
    users: UserMap
    prompts: tuple[str, ...]
    people: list[Person]
    without: list[str]  # answers without a prefix


def named(places: Sequence[epath.PathLike]) -> dict[str, epath.Path]:
    """Directories, each once, by as much of the ends of their paths as tells all apart."""
    paths = dict.fromkeys(path if in_bucket(path) else path.resolve() for path in map(run_directory, places))
    parts = 1
    while len(names := {"/".join(path.parts[-parts:]): path for path in paths}) < len(paths):
        parts += 1
    return names


def find_source(place: epath.PathLike, name: str | None = None) -> Source:
    """A run directory, or that of `e2p compare`.

    Args:
      name: that it has in the report.

    Raises:
      UserError: neither, or nothing was evaluated there yet.
    """
    path = run_directory(place)
    name = name or path.name
    runs = {name: path} if (path / "config.json").is_file() else {}
    compared = [scores.parent for scores in (path / "scores", *sorted(path.glob("seed-*/scores"))) if scores.is_dir()]
    if not runs:
        places = [config.parent for each in compared for config in sorted(each.glob("*/config.json"))]
        runs = {f"{name}/{place.relative_to(path)}": place for place in places}
    if not runs:
        raise UserError(f"{path}: neither a run directory nor one that `e2p compare` made")
    table = path / "report" / "evaluation.json"
    if not table.is_file():
        raise UserError(f"{path}: has no table of conditions (report/evaluation.json); rerun the command that made it")
    splits = read_object(table, "rerun the command that made it").get("splits")
    if not splits:
        raise UserError(
            f"{table}: holds no conditions; rerun the command that made it with --evaluate.conditions none e2p"
        )
    if any("measures" not in row for split in splits for row in split["conditions"].values()):
        raise UserError(f"{table}: written by an older version; rerun the command that made it")
    return Source(name, runs, splits)


def collect(paths: Sequence[epath.PathLike]) -> Collected:
    """Reads the tables and curves of all runs; measures robustness, cost and users of the first one with a projector.

    Raises:
      UserError: a path that is no run, or no run was trained on users' vectors.
    """
    sources = [find_source(path, name) for name, path in named(paths).items()]
    runs = {name: path for source in sources for name, path in source.runs.items()}
    learning, training = curves(runs)
    main = next((name for name, path in runs.items() if _has_users(path)), None)
    if main is None:
        raise UserError(f"{paths[0]}: no run here was trained on users' vectors; name one that was")
    run, trained = _open(runs, main)
    data, settings = run.inputs.config.data, run.inputs.config.evaluate
    split = data.eval_splits[0]
    records = read_splits(data, [split])[split]
    few = records[:: max(1, len(records) // settings.max_records)] if settings.max_records else records
    found = map_users(run, records)
    prompts = settings.prompts or PROMPTS
    people, without = _people(run, found, prompts)
    replied = [record for record in few if record.messages[-1]["role"] == "assistant"]
    return Collected(
        sources,
        learning,
        training,
        trained,
        main,
        split,
        robustness(run, few),
        serving_cost(run, replied, COSTED),
        bytes_per_user(run, few),
        found,
        prompts,
        people,
        without,
    )


def _has_users(path: epath.Path) -> bool:
    config = from_json((path / "config.json").read_text(encoding="utf-8"), path / "config.json")
    return config.data.condition == "e2p"


def _open(runs: dict[str, epath.Path], main: str) -> tuple[Run, dict[str, Training]]:
    """The main run, and what each cost to train, of which the others need no weights."""
    run = open_run(runs[main])
    return run, {
        name: training_cost(run if name == main else open_run(path, backbone="none")) for name, path in runs.items()
    }


def curves(runs: dict[str, epath.Path]) -> tuple[Curves, Curves]:
    """Held-out NLL by run and split, and training loss by run."""
    learning: Curves = {}
    training: Curves = {}
    for name, path in runs.items():
        for line in read_metrics(path / "metrics.jsonl"):
            for key, value in line.items():
                if key == "train/loss":
                    training.setdefault(name, []).append((line["step"], value))
                if key.startswith("eval/") and key.endswith("/nll"):
                    label = f"{name}: {key.removeprefix('eval/').removesuffix('/nll')}"
                    learning.setdefault(label, []).append((line["step"], value))
    return learning, training


def _people(run: Run, found: UserMap, prompts: Sequence[str]) -> tuple[list[Person], list[str]]:
    chosen = [found.records[place] for place in found.apart]
    answers = ask(run, chosen, prompts, "e2p")
    (without,) = ask(run, chosen[:1], prompts, "none")
    people = [
        Person(record.user_id, record.context, found.nearest[place], replies)
        for record, place, replies in zip(chosen, found.apart, answers, strict=True)
    ]
    return people, without
