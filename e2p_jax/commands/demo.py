"""`e2p demo`."""

import tyro

from e2p_jax.commands.common import RunPath
from e2p_jax.errors import UsageError, UserError


def demo(
    run: tyro.conf.Positional[RunPath],
    /,
    port: int = 7860,
    embeddings: str | None = None,
    checkpoint: str = "best",
) -> None:
    """Serves a page, to this machine alone, that answers as several users: with their soft tokens, without, swapped.

    Args:
      run: Run directory.
      port: Of the page, on 127.0.0.1.
      embeddings: Table of user vectors to use in place of the run's.
      checkpoint: best, last, or a step.
    """
    from e2p_jax.train.run import open_run

    if not 0 < port < 2**16:
        raise UsageError("--port must be from 1 to 65535")
    try:
        from e2p_jax.export.demo import serve
    except ModuleNotFoundError as error:
        raise UserError(f"e2p demo needs Gradio ({error}): pip install 'e2p-jax[demo]'") from error
    serve(open_run(run, checkpoint, embeddings), port)
