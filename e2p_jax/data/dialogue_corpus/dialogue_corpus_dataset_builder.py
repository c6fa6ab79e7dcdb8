"""TFDS builder of the embedded backbone's training text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from e2p_jax.data.builder import RecordBuilder
from e2p_jax.data.dialogue_corpus import generate


class Builder(RecordBuilder):
    """Splits: `train`, and `validation`: one dialogue in a hundred."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"{' and '.join(generate.SOURCES)}: JSON Lines, each line with a list `turns`."

    def _info(self) -> tfds.core.DatasetInfo:
        return self._record_info(
            description="Real and generated dialogues, many with a context in front that the replies draw on.",
            citation="Fainberg et al. (2018), Edina self-dialogues; Rastogi et al. (2020), Schema-Guided Dialogue.",
            license="BSD 3-Clause (self-dialogues), CC BY-SA 4.0 (schema-guided)",
        )

    def sources(self, directory: Path) -> list[Path]:
        return generate.sources(directory)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        directory = Path(dl_manager.manual_dir)
        splits = ("train", "validation")
        return {split: self._generate_examples(generate.records(directory, split, self.bad)) for split in splits}
