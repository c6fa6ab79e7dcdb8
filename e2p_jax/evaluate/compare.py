"""A table of conditions, each asked of the run that was trained for it.

A comparison's directory holds one run directory per trained condition, and `scores/<run>.npz`: what was measured of
that run, reused while all that it depends on stays the same (`_key`).
"""

import dataclasses
import functools
import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

import e2p_jax
from e2p_jax.baselines import ARMS, BASELINES
from e2p_jax.config import Condition, Config
from e2p_jax.data.conditions import FRONTS
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.evaluation import Evaluation, check_reported, evaluate, notes_on, rank_without, read_splits
from e2p_jax.files import write_bytes
from e2p_jax.json_files import digest
from e2p_jax.parallel.distributed import is_first
from e2p_jax.train import identity, manifest
from e2p_jax.train.loop import train_model
from e2p_jax.train.run import Run, open_run
from e2p_jax.train.score import Scores, fit_arms
from e2p_jax.train.setup import Shared

_LAYOUT = 4  # of a file of scores


def train_all(
    config: Config, directory: epath.Path, compared: Sequence[str], shared: Shared | None = None
) -> dict[str, epath.Path]:
    """Trains, or finishes, the runs that the conditions need; finished ones are left as they are.

    Args:
      shared: the backbone of runs that leave it frozen, which is loaded once.

    Returns:
      Run directories.
    """
    needed = dict.fromkeys(ARMS[name][0] for name in compared)
    check = functools.partial(check_reported, [ARMS[name][1] for name in compared])
    return {
        name: train_model(BASELINES[name](config).resolved(), directory / name, shared, check=check).directory
        for name in needed
    }


def compare(config: Config, directory: epath.Path, compared: Sequence[str]) -> list[Evaluation]:
    """Trains what is needed and evaluates all conditions on the same records and targets.

    Args:
      config: of the `e2p` run; the others are made of it.
      directory: of the comparison.
      compared: conditions, in the order of the table.

    Returns:
      One evaluation for each split that there is.
    """
    shared = Shared()
    runs = train_all(config, directory, compared, shared)
    splits = read_splits(config.data, config.data.eval_splits)
    fronts = list(dict.fromkeys(ARMS[name][1] for name in compared))
    found: dict[str, dict[str, Scores]] = {name: {} for name in splits}
    for trained, place in runs.items():
        arms = {name: ARMS[name][1] for name in compared if ARMS[name][0] == trained}
        run = open_run(place, shared=shared)
        # A record that is too long with one condition in front loses the same turns in all runs.
        encoder, most = run.inputs.encoder, config.evaluate.derangements
        fitted = {name: fit_arms(records, fronts, encoder, most)[0] for name, records in splits.items()}
        for name, scores in _scores(run, directory / "scores" / f"{trained}.npz", fitted, list(arms.values())).items():
            found[name] |= {arm: scores[front] for arm, front in arms.items()}
        kept = fitted
    samples, inputs = config.evaluate.bootstrap_samples, run.inputs
    return [
        Evaluation(
            name,
            kept[name],
            {arm: found[name][arm] for arm in compared},
            sum(len(r.messages) for r in records) - sum(len(r.messages) for r in kept[name]),
            samples,
            rank_without(config, inputs.table, inputs.catalogue, kept[name]),
            notes_on(BASELINES["e2p"](config), kept[name], fronts, inputs.table),
        )
        for name, records in splits.items()
    ]


def compare_seeds(
    config: Config, directory: epath.Path, compared: Sequence[str], seeds: Sequence[int]
) -> dict[int, list[Evaluation]]:
    """`compare` with each `train.seed`, in `directory/seed-N`: the data, the other users of `shuffled` and the
    candidates are the same for all.
    """
    return {seed: compare(config.change(train={"seed": seed}), directory / f"seed-{seed}", compared) for seed in seeds}


def pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of the same records with different seeds as one: the mean over seeds of what each record adds.

    So intervals and tests are over users, of whom there are many, about the method as it does on average over these
    seeds; of the seeds there are too few for an interval.
    """
    first = evaluations[0]
    scores = {}
    for name in first.scores:
        each = [evaluation.scores[name] for evaluation in evaluations]
        more = {measure: np.mean([s.more[measure] for s in each], axis=0) for measure in each[0].more}
        nll = np.mean([s.drawn for s in each], axis=0)
        scores[name] = dataclasses.replace(each[0], drawn=nll, more=more, replies=())
    return dataclasses.replace(first, scores=scores)


def _scores(
    run: Run, path: epath.Path, splits: dict[str, list[Record]], conditions: list[Condition]
) -> dict[str, dict[Condition, Scores]]:
    """By split and condition: read from `path`, or measured and written there."""
    key = _key(run, splits, conditions)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return {name: {c: _unpack(stored, f"{name}/{c}/") for c in conditions} for name in splits}
    except (OSError, ValueError, LookupError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        pass  # it is not there, or damaged
    found = {name: evaluate(run, records, name, conditions).scores for name, records in splits.items()}
    if is_first():
        arrays = {"key": np.array(key)}
        for name, scores in found.items():
            arrays |= {f"{name}/{c}/{column}": value for c in conditions for column, value in _pack(scores[c]).items()}
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
        write_bytes(path, packed.getvalue())
    return {name: {c: by[c] for c in conditions} for name, by in found.items()}


def _key(run: Run, splits: dict[str, list[Record]], conditions: list[Condition]) -> str:
    """Names everything that scores depend on: what is measured of which records, with which vectors, of what model."""
    inputs, settings = run.inputs, run.inputs.config.evaluate
    vectors: dict[str, str] = {}
    if inputs.table is not None and any(FRONTS[c].reads_table for c in conditions):
        for name, records in splits.items():
            held = inputs.table.gather(inputs.table.index.find(sorted({record.user_id for record in records})))
            vectors[name] = hashlib.sha256(held.data).hexdigest()
    asked = {
        "layout": _LAYOUT,
        "version": e2p_jax.__version__,
        "conditions": sorted(conditions),
        "measured": [settings.measures, settings.candidates, settings.max_records],
        "derangements": settings.derangements if any(FRONTS[c].is_shuffled for c in conditions) else None,
        "records": {name: [repr(record) for record in records] for name, records in splits.items()},
        "vectors": vectors,
        "backbone": identity.describe(inputs, run.model),
        "settings": identity.settings(inputs.config),
        "checkpoint": [run.step, manifest.digest(run.directory / "checkpoints" / str(run.step))],
    }
    return digest(asked)


_COLUMNS = ("drawn", "targets", "words", "bytes")


def _pack(scores: Scores) -> dict[str, np.ndarray]:
    more = {f"more/{name}": statistics for name, statistics in scores.more.items()}
    return {**{name: getattr(scores, name) for name in _COLUMNS}, **more, "replies": np.array(scores.replies, str)}


def _unpack(stored: Any, prefix: str) -> Scores:
    more = {name.removeprefix(f"{prefix}more/"): stored[name] for name in stored if name.startswith(f"{prefix}more/")}
    columns = {name: stored[prefix + name] for name in _COLUMNS}
    return Scores(**columns, more=more, replies=tuple(str(reply) for reply in stored[f"{prefix}replies"]))
