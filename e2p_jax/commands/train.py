"""`e2p train`."""

from collections.abc import Callable
from typing import Annotated

import tyro

from e2p_jax.commands.common import DETECTED, RunPath, print_tables
from e2p_jax.config import Config
from e2p_jax.options import Processes
from e2p_jax.terminal import Console, say


def train_command(name: str, defaults: Config) -> Callable[..., None]:
    """`train` with the named config's values as the defaults of its flags."""

    def command(
        config: tyro.conf.Positional[str],
        /,
        workdir: RunPath | None = None,
        processes: Annotated[Processes, tyro.conf.arg(name="")] = DETECTED,
        overrides: Annotated[Config, tyro.conf.arg(name="")] = defaults,
    ) -> None:
        """Trains a projector; rerun the same command to resume.

        Args:
          config: Name of a shipped config (quickstart, persona_chat, ...) or path of a Python file.
          workdir: Run directory. Default: runs/CONFIG.
          processes: Which process this is, where a run has several.
          overrides: Any field of the config.
        """
        from e2p_jax.parallel.distributed import session

        with session(processes):
            _train(overrides, name, workdir)

    return command


def _train(config: Config, name: str, workdir: str | None) -> None:
    """Trains, then shows the table of conditions, the loss curve and the answers of two held-out users."""
    from e2p_jax.evaluate.curves import draw_loss
    from e2p_jax.evaluate.evaluation import evaluate_splits, save
    from e2p_jax.evaluate.showcase import show_answers
    from e2p_jax.parallel.distributed import is_first
    from e2p_jax.train.loop import train_model

    run = train_model(config.resolved(), workdir or f"runs/{name}")
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
