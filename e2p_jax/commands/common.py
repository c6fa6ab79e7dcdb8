"""Does what several commands share."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from e2p_jax.config import Config, load_config
from e2p_jax.options import Processes
from e2p_jax.terminal import Console

if TYPE_CHECKING:
    from e2p_jax.evaluate.evaluation import Evaluation

DETECTED = Processes()
RunPath = Annotated[str, tyro.conf.arg(metavar="PATH|gs://BUCKET/NAME")]


def with_config(make: Callable[[str, Config], Callable[..., None]], arguments: list[str]) -> Callable[..., None]:
    """A command whose flags default to the values of the config that its arguments name, wherever the name stands.

    The same parser that will read the arguments finds the name. Arguments that it refuses are left for it to refuse.

    Args:
      make: (short name, values) of a config -> the command, which has a positional parameter `config`.
      arguments: the command's own; none where another command runs.

    Raises:
      UserError: the config cannot be loaded.
    """
    command = make("", Config())
    if not arguments:
        return command
    given = inspect.signature(command)

    def name(*values: Any, **flags: Any) -> str:
        return given.bind(*values, **flags).arguments["config"]

    # To show help, the config's name is enough: other text that is required need not be there.
    parameters = [
        p.replace(default="") if p.default is p.empty and p.kind is not p.POSITIONAL_ONLY else p
        for p in given.parameters.values()
    ]
    name.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    name.__annotations__ = command.__annotations__
    asked = [argument for argument in arguments if argument not in ("-h", "--help")]
    try:
        named = tyro.cli(name, args=asked, console_outputs=False)
    except SystemExit:
        return command
    return make(*load_config(named))


def print_tables(
    evaluations: "Sequence[Evaluation]", by_seed: "Mapping[int, Sequence[Evaluation]] | None" = None
) -> None:
    """Tables of conditions for each split, on stdout.

    Args:
      evaluations: one a split.
      by_seed: what they are the mean of, if they are one: shown below.
    """
    from e2p_jax.evaluate.evaluation import render, render_seeds

    console = Console(width=None if sys.stdout.isatty() else 120)
    for place, evaluation in enumerate(evaluations):
        console.print(*render(evaluation), sep="\n")
        if by_seed:
            console.print(render_seeds({seed: splits[place] for seed, splits in by_seed.items()}))
