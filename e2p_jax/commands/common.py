"""What commands share: flags, the config that is named, tables, and compiled programs."""

import contextlib
import glob
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import tyro

from e2p_jax.config import Config, load_config
from e2p_jax.config_versions import moved_flag
from e2p_jax.errors import UsageError
from e2p_jax.options import Processes
from e2p_jax.registry import KINDS
from e2p_jax.terminal import Console, say

if TYPE_CHECKING:
    from e2p_jax.evaluate.evaluation import Evaluation

DETECTED = Processes()
RunPath = Annotated[str, tyro.conf.arg(metavar="PATH|gs://BUCKET/NAME")]
# Flags that several commands have.
Named = tyro.conf.Positional[
    Annotated[
        str, tyro.conf.arg(help="Name of a shipped config (quickstart, persona_chat, ...) or path of a Python file.")
    ]
]
Run = tyro.conf.Positional[Annotated[RunPath, tyro.conf.arg(help="Run directory.")]]
Checkpoint = Annotated[str, tyro.conf.arg(help="best, last, or a step.")]
Embeddings = Annotated[str | None, tyro.conf.arg(help="Table of user vectors to use in place of the run's.")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="Print JSON to stdout in place of tables and text.")]
Together = Annotated[Processes, tyro.conf.arg(name="", help="Which process this is, where several work together.")]
Overrides = Annotated[Config, tyro.conf.arg(name="", help="Any field of the config.")]


def with_config(make: Callable[[str, Config], Callable[..., None]], arguments: list[str]) -> Callable[..., None]:
    """A command whose flags default to the values of the config that its arguments name, wherever the name stands.

    The same parser that will read the arguments finds the name. Arguments that it refuses are left for it to refuse.

    Args:
      make: (short name, values) of a config -> the command, which has a positional parameter `config`.
      arguments: the command's own; none where another command runs.

    Raises:
      UserError: the config cannot be loaded.
    """
    if not arguments:
        return make("", Config())
    kinds, others = _kinds(arguments)
    command = make("", _of_kinds(Config(), kinds))
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
    asked = [argument for argument in others if argument not in ("-h", "--help")]
    try:
        named = tyro.cli(name, args=asked, console_outputs=False)
    except SystemExit:
        return command
    short, config = load_config(named)
    return make(short, _of_kinds(config, kinds))


def _kinds(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Section -> kind, as flags name it, and the arguments less all flags of such sections: what those are depends on
    the kind, and each takes one value.

    Raises:
      UsageError: a flag of an earlier version.
    """
    kinds, others, words = dict[str, str](), list[str](), iter(arguments)
    for word in words:
        flag, is_pair, value = word.partition("=")
        section, _, field = flag.removeprefix("--").partition(".")
        if now := moved_flag(flag):
            raise UsageError(f"{flag} is {now} now")
        if not flag.startswith("--") or section not in KINDS:
            others.append(word)
            continue
        value = value if is_pair else next(words, "")
        if field == "kind":
            kinds[section] = value
    return kinds, others


def _of_kinds(config: Config, kinds: Mapping[str, str]) -> Config:
    """The config with these kinds; one that there is not is left to the parser, which refuses it."""
    return config.change(**{name: {"kind": kind} for name, kind in kinds.items() if kind in KINDS[name]})


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


_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")


@contextlib.contextmanager
def damaged_programs_removed() -> Iterator[None]:
    """Within the block, a damaged program's file makes way for the one that is compiled in its place."""
    show = warnings.showwarning
    said: set[str] = set()  # a place that cannot be written is one for every program

    def show_or_remove(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not (found := _DAMAGED.match(str(message))):
            show(message, category, filename, lineno, file, line)
            return
        cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
        programs, refused = list(cache.glob(f"{glob.escape(found[1])}-*-cache")), not os.access(cache, os.W_OK)
        with contextlib.suppress(OSError):
            for path in programs:
                path.unlink(missing_ok=True)
        if refused or any(path.exists() for path in programs):
            told = f"{cache}: cannot be written; set JAX_COMPILATION_CACHE_DIR to a place that keeps what is compiled"
        else:
            told = f"{cache}: the compiled program {found[1]} was damaged; it is compiled and kept anew"
        if told not in said:
            say(told)
        said.add(told)

    warnings.showwarning = show_or_remove
    try:
        yield
    finally:
        warnings.showwarning = show
