"""`e2p embed`."""

from pathlib import Path
from typing import Annotated

import tyro

from e2p_jax.options import EncoderSettings
from e2p_jax.registry import ENCODERS, TEXT_ENCODER, described
from e2p_jax.terminal import say

ENCODER = described(ENCODERS | {"anything else": TEXT_ENCODER})
DEFAULTS = EncoderSettings()


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
      out: Directory to write.
      settings: What some encoders need.
    """
    from e2p_jax.embed.make import make_table

    made = make_table(data, encoder, out, settings)
    nothing = f"; {made.absent:,} have nothing to make one of" if made.absent else ""
    say(f"{made.users:,} users have a vector{nothing}")
    for warning in made.warnings:
        say(f"warning: {warning}")
    print(out)
