"""`e2p import`."""

from pathlib import Path

import tyro

from e2p_jax.commands.common import say


def import_run(directory: tyro.conf.Positional[Path], /, out: Path) -> None:
    """Makes a run of an exported transformers directory, to evaluate it or to train it on.

    Args:
      directory: What `e2p export --format transformers` wrote.
      out: Run directory to make; its config.json may be edited before training goes on.
    """
    from e2p_jax.export.import_back import import_transformers

    import_transformers(directory, out)
    say(f"train on with: e2p train {out / 'config.json'} --workdir {out}")
    print(out)
