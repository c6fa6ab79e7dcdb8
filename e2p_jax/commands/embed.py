"""`e2p embed`."""

from pathlib import Path
from typing import Annotated

import tyro

from e2p_jax.options import EncoderSettings
from e2p_jax.terminal import say

DEFAULTS = EncoderSettings()


def embed(
    data: str,
    encoder: str,
    out: Path,
    settings: Annotated[EncoderSettings, tyro.conf.arg(name="")] = DEFAULTS,
) -> None:
    """Makes a table of user vectors, and prints its directory.

    Args:
      data: What `data.path` takes: a prepared dataset's directory, a JSON Lines file, or synthetic. With import: a
        table in any form.
      encoder: backbone: mean hidden state of a frozen backbone over the context; als, svd: factors of who consumed
        what, of a prepared interactions dataset; item-mean: mean of the vectors of the items in the context or history;
        import: the vectors that are in the file; anything else: directory or hub id of a text encoder.
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
