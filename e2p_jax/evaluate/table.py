"""The table of conditions: NLL, perplexity per word, and paired differences with bootstrap intervals."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.table

from e2p_jax.config import Condition
from e2p_jax.data.bad_records import BadRecords
from e2p_jax.data.prepared import load_splits
from e2p_jax.data.records import Record
from e2p_jax.evaluate.score import Scores, pack_conditions, score
from e2p_jax.files import write_text
from e2p_jax.parallel.distributed import is_first
from e2p_jax.train.metrics import Progress
from e2p_jax.train.partition import split
from e2p_jax.train.run import Run
from e2p_jax.train.setup import jit_eval_step


@dataclasses.dataclass(frozen=True)
class Difference:
    """Condition minus baseline, nats a target, with a 95 % interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    condition: Scores, baseline: Scores, users: Sequence[str], samples: int, seed: int = 0
) -> Difference:
    """Percentile bootstrap (Efron & Tibshirani, 1993) of the NLL difference per target.

    Users are resampled, each with all of their records: two dialogues of one user are not independent.
    """
    _, owner = np.unique(np.asarray(users, str), return_inverse=True)
    difference = np.bincount(owner, weights=condition.nll - baseline.nll)
    targets = np.bincount(owner, weights=condition.targets)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(targets), np.full(len(targets), 1 / len(targets)), size=samples)
    means = (counts @ difference) / (counts @ targets)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(difference.sum() / targets.sum()), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of one split's records under several conditions."""

    split: str
    records: list[Record]
    scores: dict[Condition, Scores]
    dropped_messages: int
    bootstrap_samples: int

    def difference(self, condition: Condition, baseline: Condition) -> Difference:
        users = [record.user_id for record in self.records]
        return paired_bootstrap(self.scores[condition], self.scores[baseline], users, self.bootstrap_samples)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        baselines = [b for b in ("none", "shuffled") if b in self.scores]
        conditions = {
            name: {
                "nll_per_target": s.per_target,
                "word_perplexity": s.word_perplexity,
                **{f"minus_{b}": dataclasses.asdict(self.difference(name, b)) for b in baselines if b != name},
            }
            for name, s in self.scores.items()
        }
        any_scores = next(iter(self.scores.values()))
        return {
            "split": self.split,
            "records": len(self.records),
            "users": len({record.user_id for record in self.records}),
            "targets": int(any_scores.targets.sum()),
            "words": int(any_scores.words.sum()),
            "dropped_messages": self.dropped_messages,
            "conditions": conditions,
        }

    def per_example(self) -> str:
        """JSON Lines: one line per record and condition, in input order."""
        lines = []
        for condition, scores in self.scores.items():
            for record, nll, targets in zip(self.records, scores.nll, scores.targets, strict=True):
                values = {"user_id": record.user_id, "nll": float(nll), "target_tokens": int(targets)}
                lines.append(json.dumps({**values, "condition": condition}) + "\n")
        return "".join(lines)


def evaluate(run: Run, records: Sequence[Record], split_name: str, conditions: Sequence[Condition]) -> Evaluation:
    """Scores records under each condition with one compiled step.

    Raises:
      UserError: a user without a vector, or a record that cannot fit.
    """
    inputs, model = run.inputs, run.model
    packed, kept, dropped = pack_conditions(records, conditions, inputs.encoder, inputs.table, run.population)
    trainable, frozen = split(model.params, model.mask)
    step = jit_eval_step(model)
    scores: dict[Condition, Scores] = {}
    progress = Progress(len(conditions), 0, f"evaluate {split_name}")
    with jax.set_mesh(model.mesh):
        for number, condition in enumerate(conditions, 1):
            rows = inputs.config.train.rows
            scores[condition] = score(packed[condition], kept, lambda b: step(trainable, frozen, b), model.mesh, rows)
            progress.update(number, condition, show=True)
    progress.close()
    return Evaluation(split_name, kept, scores, dropped, inputs.config.evaluate.bootstrap_samples)


def evaluate_splits(run: Run, splits: Sequence[str], conditions: Sequence[Condition]) -> list[Evaluation]:
    """`evaluate` on every split of the run's data that there is; none where no condition is asked for.

    Raises:
      UserError: the first split is absent, or a record or vector is at fault.
    """
    if not conditions:
        return []
    data = run.inputs.config.data
    bad = BadRecords(data.on_bad_record, data.max_bad_share)
    found = load_splits(data.path, splits, bad)
    if (skipped := bad.report()) and is_first():
        print(skipped, file=sys.stderr)
    return [evaluate(run, records, name, conditions) for name, records in found.items()]


def render(evaluation: Evaluation) -> rich.table.Table:
    """The table people read."""
    values = evaluation.to_dict()
    size = f"{values['records']} conversations of {values['users']} users, {values['targets']:,} targets"
    title = f"{evaluation.split}: {size}"
    table = rich.table.Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "differences in nats a target, 95 % paired bootstrap over users; below zero is better"
    table.add_column("condition")
    for column in ("NLL/target", "PPL/word", "minus none", "minus shuffled"):
        table.add_column(column, justify="right")

    def interval(entry: dict[str, float] | None) -> str:
        return "" if entry is None else f"{entry['mean']:+.4f} [{entry['low']:+.4f}, {entry['high']:+.4f}]"

    for name, row in values["conditions"].items():
        table.add_row(
            name,
            f"{row['nll_per_target']:.4f}",
            f"{row['word_perplexity']:.2f}",
            interval(row.get("minus_none")),
            interval(row.get("minus_shuffled")),
        )
    return table


def save(run: Run, evaluations: Sequence[Evaluation]) -> Path:
    """Writes `report/evaluation.json`."""
    path = run.directory / "report" / "evaluation.json"
    values = {"checkpoint": run.step, "splits": [evaluation.to_dict() for evaluation in evaluations]}
    write_text(path, json.dumps(values, indent=2) + "\n")
    return path
