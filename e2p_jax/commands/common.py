"""What several commands share."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import rich.console
import tyro

from e2p_jax.config import Config, load_config
from e2p_jax.options import Processes

if TYPE_CHECKING:
    from e2p_jax.evaluate.table import Evaluation

DETECTED = Processes()
RunPath = Annotated[str, tyro.conf.arg(metavar="PATH|gs://BUCKET/NAME")]


def named_config(arguments: list[str]) -> tuple[str, Config]:
    """Short name and values of the config that a command's first argument names; the defaults where it names none."""
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    return load_config(named) if named else ("", Config())


def say(text: str) -> None:
    """A message for the person at the terminal."""
    print(text, file=sys.stderr)


def print_tables(
    evaluations: "Sequence[Evaluation]", by_seed: "Mapping[int, Sequence[Evaluation]] | None" = None
) -> None:
    """Tables of conditions for each split, on stdout.

    Args:
      evaluations: one a split.
      by_seed: what they are the mean of, if they are one: shown below.
    """
    from e2p_jax.evaluate.table import render, render_seeds

    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    for place, evaluation in enumerate(evaluations):
        console.print(*render(evaluation), sep="\n")
        if by_seed:
            console.print(render_seeds({seed: splits[place] for seed, splits in by_seed.items()}))
