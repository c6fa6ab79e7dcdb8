"""`e2p import`."""

from pathlib import Path

import tyro

from e2p_jax.terminal import say


def import_run(
    directory: tyro.conf.Positional[Path], /, out: Path, data: str | None = None, embeddings: str | None = None
) -> None:
    """Makes a run of an exported transformers directory, to evaluate it or to train it on.

    Args:
      directory: What `e2p export --format transformers` wrote.
      out: Run directory to make; its config.json may be edited before training goes on.
      data: Records to train on: as `data.path` of a config. Default: what the export names, if it is found from here.
      embeddings: Table of user vectors. Default: what the export names, if it is found from here.
    """
    from e2p_jax.export.import_back import import_transformers

    config = import_transformers(directory, out, data, embeddings)
    if config.data.embeddings is None:
        say("no table of user vectors is named or found from here; to train on, import again with --embeddings TABLE")
    say(f"train on with: e2p train {out / 'config.json'} --workdir {out}")
    print(out)
