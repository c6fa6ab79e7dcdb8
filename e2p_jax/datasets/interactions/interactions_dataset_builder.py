"""TFDS builder of anything that users consume: music, podcasts, films."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from e2p_jax.datasets.builder import RecordBuilder, RecordConfig
from e2p_jax.datasets.interactions import layouts
from e2p_jax.datasets.interactions.log import save_interactions
from e2p_jax.datasets.interactions.notes import covered, notes
from e2p_jax.datasets.interactions.split import Options, records, split


class Builder(RecordBuilder):
    """Splits: `train`, `validation` and `test`; each record asks for the title of an item the user had next."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        RecordConfig(
            name="leave_last_out",
            description="Each user's last item is test, the one before validation, those before them train.",
            options=Options(split="leave_last_out"),
        ),
        RecordConfig(
            name="time",
            description="Two cuts in time, the same for all users, part train, validation and test.",
            options=Options(split="time"),
        ),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The files of one layout: " + "; ".join(
        f"{layout.interactions.name} and {layout.items.name} ({layout.name})" for layout in layouts.LAYOUTS
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self._record_info(description="Who consumed what; a record asks for the title of the next item.")

    def sources(self, directory: Path) -> list[Path]:
        return layouts.files(directory, layouts.find_layout(directory))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        options = self.builder_config.options
        log = layouts.read_log(Path(dl_manager.manual_dir), self.bad)
        interactions, self.left_out = split(log, options)
        self.notes = notes(interactions, options, len(log.user_ids))
        save_interactions(Path(self.data_dir), interactions)
        names = ("train", "validation", "test")
        learned = ("train", "history") if options.folds else ("train",)
        asked = {"train": interactions.of(*learned)} | {name: interactions.of(name) for name in names[1:]}
        made = {name: records(interactions, options, name) for name in names if len(asked[name])}
        targets = {interactions.titles[item] for item in asked["train"].items}
        return {name: self._generate_examples(covered(rows, name, targets, self.notes)) for name, rows in made.items()}
