"""`e2p train` and `e2p compare`."""

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from e2p_jax.baselines import ARMS, BASELINES
from e2p_jax.commands.common import DETECTED, Json, Named, Overrides, RunPath, Together, print_tables
from e2p_jax.config import Config
from e2p_jax.errors import UsageError
from e2p_jax.registry import one_of
from e2p_jax.terminal import Console, say


def train_command(name: str, defaults: Config) -> Callable[..., None]:
    """`train` with the named config's values as the defaults of its flags."""

    def command(
        config: Named,
        /,
        workdir: RunPath | None = None,
        profile: int = 0,
        processes: Together = DETECTED,
        overrides: Overrides = defaults,
    ) -> None:
        """Trains a projector; rerun the same command to resume.

        Args:
          workdir: Run directory. Default: runs/CONFIG.
          profile: Steps to trace, from the third on, into profile/ of the run directory, for XProf and TensorBoard.
        """
        from e2p_jax.parallel.distributed import session

        if profile < 0:
            raise UsageError("--profile must not be negative")
        with session(processes):
            _train(overrides, name, workdir, profile)

    return command


def _train(config: Config, name: str, workdir: str | None, profile: int) -> None:
    """Trains, then shows the table of conditions, the loss curve and the answers of two held-out users."""
    from e2p_jax.evaluate.evaluation import check_reported, evaluate_splits, save
    from e2p_jax.evaluate.users import show_answers
    from e2p_jax.parallel.distributed import is_first
    from e2p_jax.report.figures import draw_loss
    from e2p_jax.train.loop import train_model

    check = functools.partial(check_reported, config.evaluate.conditions)
    run = train_model(config.resolved(), workdir or f"runs/{name}", profile=profile, check=check)
    if is_first():
        say(f"loss curve: {draw_loss(run.directory)}")
    if config.evaluate.conditions or config.evaluate.prompts:
        evaluations = evaluate_splits(run, config.data.eval_splits, config.evaluate.conditions)
        if is_first():
            save(run, evaluations)
            print_tables(evaluations)
        show_answers(run, Console(quiet=not is_first()))
    if is_first():
        say(f"run directory: {run.directory}")


ALL = ("none", "shuffled", "mean", "static", "e2p", "text", "text+shuffled", "e2p+text", "lora")


def compare_command(name: str, defaults: Config) -> Callable[..., None]:
    """`compare` with the named config's values as the defaults of its flags."""
    trained, asked = ", ".join(BASELINES), ", ".join(name for name in ARMS if name not in BASELINES)
    rows = f"Rows of the table. Trained each in a run of its own: {trained}. Asked of one of those: {asked}."

    def command(
        config: Named,
        /,
        conditions: Annotated[tuple[Annotated[str, one_of(ARMS)], ...], tyro.conf.arg(help=rows)] = ALL,
        workdir: RunPath | None = None,
        seeds: tuple[int, ...] = (),
        as_json: Json = False,
        processes: Together = DETECTED,
        overrides: Overrides = defaults,
    ) -> None:
        """Trains and evaluates a whole table of conditions; rerun it to resume, or with more conditions.

        Args:
          conditions: Rows of the table: `baselines.ARMS`.
          workdir: Directory of the runs and the report. Default: runs/compare-CONFIG.
          seeds: Values of `train.seed`, each compared in WORKDIR/seed-N; the table is of their mean. Default: the
            config's one, in WORKDIR itself.
        """
        from e2p_jax.evaluate.compare import compare, compare_seeds, pool
        from e2p_jax.files import run_directory, write_text
        from e2p_jax.parallel.distributed import is_first, session

        if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
            raise UsageError("--seeds must be different whole numbers from 0 to below 2^32")
        directory = run_directory(workdir or f"runs/compare-{name}")
        with session(processes):
            by_seed = compare_seeds(overrides, directory, conditions, seeds)
            if seeds:
                evaluations = [pool(splits) for splits in zip(*by_seed.values(), strict=True)]
            else:
                evaluations = compare(overrides, directory, conditions)
            if not is_first():
                return
            values: dict[str, Any] = {"splits": [evaluation.to_dict() for evaluation in evaluations]}
            if seeds:
                values["seeds"] = {seed: [each.to_dict() for each in splits] for seed, splits in by_seed.items()}
            path = directory / "report" / "evaluation.json"
            write_text(path, json.dumps(values, indent=2) + "\n")
            if as_json:
                print(json.dumps(values))
            else:
                print_tables(evaluations, by_seed)
            say(f"table: {path}")

    return command
