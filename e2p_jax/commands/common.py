"""What several commands share."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import rich.console

from e2p_jax.parallel.distributed import Processes

if TYPE_CHECKING:
    from e2p_jax.evaluate.table import Evaluation

DETECTED = Processes()


def say(text: str) -> None:
    """A message for the person at the terminal."""
    print(text, file=sys.stderr)


def print_tables(evaluations: "Sequence[Evaluation]") -> None:
    """A table of conditions for each split, on stdout."""
    from e2p_jax.evaluate.table import render

    for evaluation in evaluations:
        rich.console.Console(width=None if sys.stdout.isatty() else 120).print(render(evaluation))
