"""`e2p data`."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Literal

import tyro

from e2p_jax.config import Config
from e2p_jax.errors import UsageError
from e2p_jax.terminal import Console


def data_command(_: str, defaults: Config) -> Callable[..., None]:
    """`data` with the named config's values as the defaults of its flags."""

    def command(
        what: tyro.conf.Positional[Literal["stats", "show"]],
        config: tyro.conf.Positional[str],
        /,
        rows: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 3,
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
        overrides: Annotated[Config, tyro.conf.arg(name="")] = defaults,
    ) -> None:
        """Tells what a config's data comes to, or shows rows as training gets them. Reads no weights.

        Args:
          what: stats: counts, lengths, packing, drops, vectors, leaks between splits; show: the first rows of the first
            epoch, with slots and targets marked.
          config: Name of a shipped config (quickstart, persona_chat, ...) or path of a Python file.
          rows: With show: how many.
          as_json: With stats: print JSON.
          overrides: Any field of the config.
        """
        from e2p_jax.data.pipeline import epoch_order
        from e2p_jax.data.show import show_row
        from e2p_jax.data.statistics import render, statistics
        from e2p_jax.datasets.prepared import load_table
        from e2p_jax.train.loop import read_data
        from e2p_jax.train.setup import read_inputs

        if rows < 1:
            raise UsageError("--rows must be positive")
        inputs = read_inputs(overrides.resolved())
        console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty())
        if what == "stats":
            embeddings = overrides.data.embeddings
            table = load_table(embeddings, "null") if embeddings else None
            values = statistics(inputs.config, inputs.encoder, table)
            if as_json:
                print(json.dumps(values))
            else:
                console.print(*render(values), sep="\n")
            return
        dataset = read_data(inputs).train
        marks = not console.is_terminal
        for row in epoch_order(overrides.train.seed, 0, len(dataset.rows))[:rows].tolist():
            for line in show_row(dataset, row, inputs.encoder.tokenizer, marks=marks):
                console.print(line)

    return command
