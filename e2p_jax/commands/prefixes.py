"""`e2p prefixes`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from e2p_jax.commands.common import DETECTED, RunPath
from e2p_jax.options import Processes


def prefixes(
    run: tyro.conf.Positional[RunPath],
    /,
    out: Path,
    embeddings: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    checkpoint: str = "best",
    processes: Annotated[Processes, tyro.conf.arg(name="")] = DETECTED,
) -> None:
    """Projects every user of a table once, to be looked up when serving; rerun it to resume or to update.

    Args:
      run: Run directory.
      out: Directory to write, or to update; with several processes, on storage that all share.
      embeddings: Table of user vectors to use in place of the run's.
      dtype: Of the soft tokens.
      checkpoint: best, last, or a step.
      processes: Which process this is, where several project together.
    """
    from e2p_jax.export.prefix_table import export_prefixes
    from e2p_jax.parallel.distributed import is_first, session
    from e2p_jax.train.run import open_run

    with session(processes):
        export_prefixes(open_run(run, checkpoint, embeddings), out, dtype)
        if is_first():
            print(out)
