"""`e2p evaluate`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from e2p_jax.commands.common import DETECTED, RunPath, print_tables
from e2p_jax.config import Condition, Measures
from e2p_jax.options import Processes


def evaluate(
    run: tyro.conf.Positional[RunPath],
    /,
    conditions: tuple[Condition, ...] = (),
    measures: tuple[Measures, ...] = (),
    split: str | None = None,
    data: Path | None = None,
    embeddings: str | None = None,
    checkpoint: str = "best",
    per_example: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    processes: Annotated[Processes, tyro.conf.arg(name="")] = DETECTED,
) -> None:
    """Scores a run under several conditions.

    Args:
      run: Run directory.
      conditions: What stands in front: none, e2p, text, e2p+text, static (the mean vector, for a run trained on it),
        and instead of the user's vector: shuffled (another user's), mean, zero, noise. Default: the run's config.
      measures: Beside likelihood: ranking, users, texts. Default: the run's config.
      split: Split of the run's dataset. Default: all of `data.eval_splits`.
      data: JSON Lines file to score in place of the run's dataset.
      embeddings: Table of user vectors to use in place of the run's.
      checkpoint: best, last, or a step.
      per_example: Write one JSON line per record and condition to this file, in input order.
      as_json: Print JSON to stdout in place of the table.
      processes: Which process this is, where several score together.
    """
    from e2p_jax.evaluate.evaluation import evaluate_splits
    from e2p_jax.files import write_text
    from e2p_jax.parallel.distributed import is_first, session
    from e2p_jax.train.run import open_run

    with session(processes):
        opened = open_run(run, checkpoint, embeddings)
        config = opened.inputs.config
        if data is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data)))
        if measures:
            config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, measures=measures))
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
