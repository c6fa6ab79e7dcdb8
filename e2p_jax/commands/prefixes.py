"""`e2p prefixes`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from e2p_jax.commands.common import DETECTED, RunPath
from e2p_jax.options import Processes
from e2p_jax.terminal import say


def prefixes(
    run: tyro.conf.Positional[RunPath],
    /,
    out: Path,
    embeddings: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    checkpoint: str = "best",
    keep_hours: float = 24.0,
    processes: Annotated[Processes, tyro.conf.arg(name="")] = DETECTED,
) -> None:
    """Projects every user of a table once, to be looked up when serving; rerun it to resume, to update, or to mend.

    Args:
      run: Run directory.
      out: Directory to write, or to update; with several processes, on storage that all share.
      embeddings: Table of user vectors to use in place of the run's.
      dtype: Of the soft tokens.
      checkpoint: best, last, or a step.
      keep_hours: How long at least files stay that an update takes out, for readers that opened the table before.
      processes: Which process this is, where several project together.
    """
    from e2p_jax.export.prefix_table import export_prefixes
    from e2p_jax.parallel.distributed import is_first, session
    from e2p_jax.train.run import open_run

    with session(processes):
        written = export_prefixes(open_run(run, checkpoint, embeddings, backbone="embedding"), out, dtype, keep_hours)
        if is_first():
            say(written.text())
            print(out)
