"""`e2p prepare`."""

from pathlib import Path
from typing import Annotated

import tyro

from e2p_jax.config import OnBadRecord
from e2p_jax.registry import DATASETS, described

DATASET = f"{described(DATASETS)} Or a configuration: persona_chat/self_revised."


def prepare(
    dataset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(help=DATASET)]],
    /,
    manual_dir: Path,
    data_dir: Path,
    options: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = (),
    on_bad_record: OnBadRecord = "error",
    max_bad_share: float = 0.01,
) -> None:
    """Writes a dataset in TFDS form, and prints its directory.

    Args:
      dataset: One of `registry.DATASETS`, or a configuration of it.
      manual_dir: Where the original files lie.
      data_dir: Where prepared datasets go.
      options: Options to change, as name=value; docs/data.md lists them, and so does the error for an unknown one.
      on_bad_record: error: a record that breaks its format ends it; skip: it is left out and counted.
      max_bad_share: With skip: a larger share of bad records in a file is an error.
    """
    from e2p_jax.datasets.bad_records import BadRecords
    from e2p_jax.datasets.prepare import prepare as run

    print(run(dataset, manual_dir, data_dir, options, BadRecords(on_bad_record, max_bad_share)))
