"""`e2p report`."""

from pathlib import Path

import tyro

from e2p_jax.commands.common import RunPath


def report(runs: tyro.conf.Positional[tuple[RunPath, ...]], /, out: Path) -> None:
    """Writes one self-contained HTML page with its pictures (PNG) and numbers (CSV).

    Args:
      runs: Run directories, or directories of `e2p compare`. Tables and learning curves are of all of them; robustness,
        cost, the map of users and their answers are of the first run with a projector.
      out: Directory to write.
    """
    from e2p_jax.errors import UserError
    from e2p_jax.report.report import write_report

    if not runs:
        raise UserError("name at least one run directory")
    print(write_report(runs, out))
