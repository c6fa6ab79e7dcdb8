"""`e2p prefixes`."""

from pathlib import Path
from typing import Literal

import tyro


def prefixes(
    run: tyro.conf.Positional[Path],
    /,
    out: Path,
    embeddings: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    checkpoint: str = "best",
) -> None:
    """Projects every user of a table once, to be looked up when serving; rerun it to resume or to update.

    Args:
      run: Run directory.
      out: Directory to write, or to update.
      embeddings: Table of user vectors to use in place of the run's.
      dtype: Of the soft tokens.
      checkpoint: best, last, or a step.
    """
    from e2p_jax.export.prefix_table import export_prefixes
    from e2p_jax.train.run import open_run

    export_prefixes(open_run(run, checkpoint, embeddings), out, dtype)
    print(out)
