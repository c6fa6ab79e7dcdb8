"""Builds TFDS data sets: the features of a record, options, and what happens to bad records."""

import abc
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.prepared import FIELDS
from e2p_jax.datasets.records import Record, check


@dataclasses.dataclass(eq=False)
class RecordConfig(tfds.core.BuilderConfig):
    """A configuration of a builder."""

    options: Any = None
    """What can be set besides: a frozen dataclass with a method `validate`, or None."""


class RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """A builder whose examples are records, in the order they were made."""

    def __init__(self, *, bad: BadRecords | None = None, **arguments: Any) -> None:
        """
        Args:
          bad: The policy for malformed records; the first one is an error by default.
          arguments: What every TFDS builder takes.
        """
        self.bad = bad or BadRecords()
        self.left_out: dict[str, int] = {}  # how many of what, by the dataset's own rules
        self.notes: list[str] = []  # what else to know of what was written, a line each
        super().__init__(**arguments)

    @abc.abstractmethod
    def sources(self, directory: Path) -> list[Path]:
        """The original files in `directory`.

        Raises:
          UserError: naming the file that is missing.
        """

    def _record_info(self, **about: Any) -> tfds.core.DatasetInfo:
        """
        Args:
          about: `description`, `citation` and the like.
        """
        text = tfds.features.Text
        features = tfds.features.FeaturesDict(
            {
                "user_id": text(),
                "context": tfds.features.Sequence(text()),
                "messages": tfds.features.Sequence({"role": text(), "content": text()}),
                "candidates": tfds.features.Sequence(text()),
                "references": tfds.features.Sequence(text()),
                "items": tfds.features.Sequence(text()),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True, metadata=tfds.core.MetadataDict(), **about
        )

    def _generate_examples(self, records: Iterable[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row number and TFDS example of every record.

        Raises:
          UserError: a record is not fit to learn from.
        """
        for row, record in enumerate(map(check, records)):
            yield row, {name: getattr(record, name) for name in FIELDS}
