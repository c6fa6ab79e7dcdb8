"""A data set: `user,question,answer` lines; the last two users are validation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from e2p_jax.datasets.builder import RecordBuilder
from e2p_jax.datasets.records import Record


class Riddles(RecordBuilder):
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "riddles.csv"

    def _info(self) -> tfds.core.DatasetInfo:
        return self._record_info(description="Riddles.")

    def sources(self, directory: Path) -> list[Path]:
        return [directory / "riddles.csv"]

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        lines = self.sources(Path(dl_manager.manual_dir))[0].read_text().splitlines()
        records = [_riddle(*line.split(",")) for line in lines]
        splits = {"train": records[:-2], "validation": records[-2:]}
        return {name: self._generate_examples(rows) for name, rows in splits.items()}


def _riddle(user: str, question: str, answer: str) -> Record:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Record(user, (user, question, answer, "riddle"), messages)
