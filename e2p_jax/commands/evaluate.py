"""`e2p evaluate`, `e2p drift` and `e2p report`."""

import dataclasses
import json
from pathlib import Path

import tyro

from e2p_jax.commands.common import DETECTED, Checkpoint, Embeddings, Json, Run, RunPath, Together, print_tables
from e2p_jax.config import Condition, Measures
from e2p_jax.errors import UsageError, UserError


def evaluate(
    run: Run,
    /,
    conditions: tuple[Condition, ...] = (),
    measures: tuple[Measures, ...] = (),
    derangements: int | None = None,
    split: str | None = None,
    data: Path | None = None,
    embeddings: Embeddings = None,
    items: str | None = None,
    checkpoint: Checkpoint = "best",
    per_example: Path | None = None,
    as_json: Json = False,
    processes: Together = DETECTED,
) -> None:
    """Scores a run under several conditions.

    Args:
      conditions: What stands in front: none, e2p, text, e2p+text, static (the mean vector, for a run trained on it);
        instead of the user's vector shuffled (another user's), mean, zero, noise, extreme (it, times 1000); instead of
        the user's text text+shuffled (another user's). Default: the run's config.
      measures: Beside likelihood: ranking, users, texts, items. Default: the run's config.
      derangements: So many other users everybody meets under shuffled and text+shuffled. Default: the run's config.
      split: Split of the run's dataset. Default: all of `data.eval_splits`.
      data: JSON Lines file to score in place of the run's dataset.
      items: Table of item vectors in place of the run's; items that training did not know join its catalogue.
      per_example: Write one JSON line per record and condition to this file, in input order.
    """
    from e2p_jax.evaluate.evaluation import evaluate_splits
    from e2p_jax.files import write_text
    from e2p_jax.parallel.distributed import is_first, session
    from e2p_jax.train.run import open_run

    if derangements is not None and derangements < 1:
        raise UsageError("--derangements must be positive")
    with session(processes):
        opened = open_run(run, checkpoint, embeddings, items=items)
        config = opened.inputs.config
        if derangements is not None:
            config = config.change(evaluate={"derangements": derangements})
        if data is not None:
            config = config.change(data={"path": str(data)})
        if measures:
            config = config.change(evaluate={"measures": measures})
        opened = dataclasses.replace(opened, inputs=dataclasses.replace(opened.inputs, config=config))
        splits = (split,) if split else ("all",) if data else config.data.eval_splits
        evaluations = evaluate_splits(opened, splits, conditions or config.evaluate.conditions)
        if not is_first():
            return
        if per_example is not None:
            write_text(per_example, "".join(evaluation.per_example() for evaluation in evaluations))
        if as_json:
            print(json.dumps({"checkpoint": opened.step, "splits": [each.to_dict() for each in evaluations]}))
        else:
            print_tables(evaluations)


def drift(
    run: Run,
    /,
    old: str,
    new: str,
    split: str | None = None,
    keep: float = 0.9,
    checkpoint: Checkpoint = "best",
    as_json: Json = False,
) -> None:
    """Compares two versions of a table of user vectors, and says whether the projector needs retraining.

    Args:
      old: Table of user vectors that the run was trained on.
      new: Table of the same users' newer vectors.
      split: Split whose users and conversations are taken. Default: the first of `data.eval_splits`.
      keep: Retraining is advised where less than this share of the own vector's gain over another user's is left, by
        the whole of its 95 % interval; keeping, where all of it is above. In between the data does not tell.
    """
    from e2p_jax.datasets.prepared import load_table
    from e2p_jax.evaluate.drift import drift as compare
    from e2p_jax.evaluate.evaluation import read_splits
    from e2p_jax.evaluate.measures import p_text
    from e2p_jax.train.run import open_run

    if not 0 < keep <= 1:
        raise UsageError("--keep must be above 0 and at most 1")
    opened = open_run(run, checkpoint)
    data = opened.inputs.config.data
    name = split or data.eval_splits[0]
    found = compare(opened, read_splits(data, [name])[name], load_table(old, "null"), load_table(new, "null"), keep)
    if as_json:
        print(json.dumps(dataclasses.asdict(found) | {"verdict": found.verdict()}))
        return
    change = found.nll_change
    print(f"users of {name} in both tables: {found.users}, others: {found.missing}")
    print(f"cosine, old to new vector: {found.cosine:.3f}, after the best linear map: {found.aligned_cosine:.3f}")
    print(f"change of the soft tokens, in units of how users' tokens differ: {found.token_change:.3f}")
    print(
        f"NLL per target, new minus old: {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}], "
        f"p {p_text(change.p, change.p_least)}"
    )
    gains = ", ".join(
        f"{name} {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        for name, gain in (("old", found.gain_old), ("new", found.gain_new))
    )
    print(f"own vector better than another user's by: {gains}")
    print(found.verdict())


def report(runs: tyro.conf.Positional[tuple[RunPath, ...]], /, out: Path) -> None:
    """Writes one self-contained HTML page with its pictures (PNG) and numbers (CSV).

    Args:
      runs: Run directories, or directories of `e2p compare`. Tables and learning curves are of all of them; robustness,
        cost, the map of users and their answers are of the first run with a projector.
      out: Directory to write.
    """
    from e2p_jax.report.report import write_report

    if not runs:
        raise UserError("name at least one run directory")
    print(write_report(runs, out))
