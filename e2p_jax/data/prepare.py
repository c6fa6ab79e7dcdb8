"""Original files -> a prepared dataset: TFDS, array_record."""

import contextlib
import hashlib
import importlib
import sys
from pathlib import Path

from e2p_jax.errors import UserError

DATASETS = ("persona_chat", "persona_chat/self_revised", "dialogue_corpus")  # a package beside this file [/config]


def prepare(dataset: str, manual_dir: Path, data_dir: Path) -> Path:
    """Writes a dataset under `data_dir`, unless it is there already. It appears whole or not at all.

    Args:
      dataset: One of `DATASETS`.
      manual_dir: Where the original files lie.
      data_dir: Where prepared datasets go.

    Returns:
      The directory that `load_records` reads.

    Raises:
      UserError: an unknown dataset, a missing or malformed original file, or a directory prepared from other files.
    """
    if dataset not in DATASETS:
        raise UserError(f"dataset {dataset!r}: unknown; there are {', '.join(DATASETS)}")
    manual_dir, data_dir = manual_dir.expanduser(), data_dir.expanduser()
    if not manual_dir.is_dir():
        raise UserError(f"--manual-dir {manual_dir}: not a directory; it must hold the dataset's original files")
    import tensorflow_datasets as tfds

    name, _, config = dataset.partition("/")
    module = importlib.import_module(f"e2p_jax.data.{name}.{name}_dataset_builder")
    builder = module.Builder(config=config or None, data_dir=data_dir)
    directory = Path(builder.data_dir)
    sources = {path.name: _digest(path) for path in module.sources(manual_dir, builder.builder_config)}
    if directory.exists():
        before = builder.info.metadata.get("sources", {})
        if changed := sorted(file for file in before | sources if before.get(file) != sources.get(file)):
            raise UserError(
                f"{directory}: not prepared from what --manual-dir holds now ({', '.join(changed)}); "
                "delete it to prepare it anew, or give another --data-dir"
            )
        return directory
    builder.info.metadata["sources"] = sources
    download_config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    with contextlib.redirect_stdout(sys.stderr):  # TFDS tells its progress on stdout, which is for results
        builder.download_and_prepare(download_config=download_config, file_format="array_record")
    return directory


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
