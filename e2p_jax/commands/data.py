"""`e2p data`, `e2p prepare` and `e2p embed`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from e2p_jax.commands.common import Named, Overrides
from e2p_jax.config import Config, OnBadRecord
from e2p_jax.errors import UsageError
from e2p_jax.options import EncoderSettings
from e2p_jax.registry import DATASETS, ENCODERS, TEXT_ENCODER, described
from e2p_jax.terminal import Console, say

DATASET = f"{described(DATASETS)} Or a configuration: persona_chat/self_revised."
ENCODER = described(ENCODERS | {"anything else": TEXT_ENCODER})
DEFAULTS = EncoderSettings()


def data_command(_: str, defaults: Config) -> Callable[..., None]:
    """`data` with the named config's values as the defaults of its flags."""

    def command(
        what: tyro.conf.Positional[Literal["stats", "show"]],
        config: Named,
        /,
        rows: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 3,
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
        overrides: Overrides = defaults,
    ) -> None:
        """Tells what a config's data comes to, or shows rows as training gets them. Reads no weights.

        Args:
          what: stats: counts, lengths, packing, drops, vectors, leaks between splits; show: the first rows of the first
            epoch, with slots and targets marked.
          rows: With show: how many.
          as_json: With stats: print JSON.
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


def prepare(
    dataset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(help=DATASET)]],
    /,
    manual_dir: Path,
    data_dir: Path,
    options: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = (),
    on_bad_record: OnBadRecord = "error",
    max_bad_share: float = 0.01,
) -> None:
    """Writes a dataset in TFDS form, and prints its directory.

    Args:
      dataset: One of `registry.DATASETS`, or a configuration of it.
      manual_dir: Where the original files lie.
      data_dir: Where prepared datasets go.
      options: Options to change, as name=value; docs/data.md lists them, and so does the error for an unknown one.
      on_bad_record: error: a record that breaks its format ends it; skip: it is left out and counted.
      max_bad_share: With skip: a larger share of bad records in a file is an error.
    """
    from e2p_jax.datasets.bad_records import BadRecords
    from e2p_jax.datasets.prepare import prepare as run

    print(run(dataset, manual_dir, data_dir, options, BadRecords(on_bad_record, max_bad_share)))


def embed(
    data: str,
    encoder: Annotated[str, tyro.conf.arg(help=ENCODER)],
    out: Path,
    settings: Annotated[EncoderSettings, tyro.conf.arg(name="")] = DEFAULTS,
) -> None:
    """Makes a table of user vectors, and prints its directory.

    Args:
      data: What `data.path` takes: a prepared dataset's directory, a JSON Lines file, or synthetic. With import: a
        table in any form.
      encoder: One of `registry.ENCODERS`, or a text encoder.
      out: Directory to write; als and svd write `OUT-items` with the vectors of the items, too.
      settings: What some encoders need.
    """
    from e2p_jax.embed.make import make_table

    made = make_table(data, encoder, out, settings)
    nothing = f"; {made.absent:,} have nothing to make one of" if made.absent else ""
    say(f"{made.users:,} users have a vector{nothing}")
    for warning in made.warnings:
        say(f"warning: {warning}")
    print(out)
