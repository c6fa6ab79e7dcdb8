"""`e2p prepare`."""

from pathlib import Path

import tyro


def prepare(dataset: tyro.conf.Positional[str], /, manual_dir: Path, data_dir: Path) -> None:
    """Writes a dataset in TFDS form, and prints its directory.

    Args:
      dataset: persona_chat, persona_chat/self_revised, or dialogue_corpus.
      manual_dir: Where the original files lie.
      data_dir: Where prepared datasets go.
    """
    from e2p_jax.data.prepare import prepare as run

    print(run(dataset, manual_dir, data_dir))
