"""Records at rest: as TFDS examples, and the one reader of every place that records and user vectors are read from.

TensorFlow Datasets is slow to import, so it is imported only where a prepared directory is written or read.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from e2p_jax.config import DataConfig
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.records import Record, hold_out, read_jsonl
from e2p_jax.errors import UserError
from e2p_jax.vectors.table import UserTable, open_table

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# What a prepared example holds. Tools, and what a message says beside role and content, are for JSON Lines alone.
FIELDS = tuple(field.name for field in dataclasses.fields(Record) if field.name not in ("source", "tools"))


class AbsentSplit(UserError):
    """The data has no such split."""


def load_records(path: str, split: str, bad: BadRecords | None = None) -> list[Record]:
    """Reads one split of `data.path` as `stream_records` does, and holds all of it."""
    return list(stream_records(path, split, bad))


def stream_records(path: str, split: str, bad: BadRecords | None = None) -> Iterator[Record]:
    """Reads one split of `data.path` record by record, in the order it was written.

    Args:
      path: `synthetic`, a prepared dataset's directory, or a JSON Lines file.
      split: Its name.
      bad: The policy for malformed records of a JSON Lines file; the first one is an error by default.

    Raises:
      UserError: no such place, a directory that `e2p prepare` did not write, no such split, or no records in it.
    """
    place = Path(path).expanduser()
    if path == "synthetic":
        records: Iterable[Record] = synthetic.records(split)
    elif place.is_dir():
        records = _read_prepared(place, split)
    elif place.is_file():
        records = read_jsonl(place, split, bad)
    else:
        raise UserError(f"data.path: {place} does not exist; give a prepared dataset's directory or a JSON Lines file")
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise AbsentSplit(f"{path}: split {split!r} holds no records")


def load_table(path: str, missing: Literal["error", "null"] = "error") -> UserTable:
    """Opens a TABLE argument: what `open_table` opens, or `synthetic`, the generated personas' vectors.

    Args:
      missing: What a user who is not in it gets: an error, or NaN, the null user's mark.

    Raises:
      UserError: unknown form, missing parts, wrong shapes.
    """
    if path == "synthetic":
        users = [*synthetic.TRAIN, *synthetic.VALIDATION]
        vectors = np.stack([synthetic.vector(user) for user in users])
        return UserTable([f"user-{user}" for user in users], vectors, path, missing)
    return open_table(path, missing)


def split_names(path: str) -> tuple[str, ...]:
    """The splits that `load_records` reads all records of `data.path` by.

    Raises:
      UserError: a directory that `e2p prepare` did not write.
    """
    place = Path(path).expanduser()
    if path == "synthetic":
        return ("train", "validation")
    return tuple(_open_prepared(place).info.splits) if place.is_dir() else ("all",)


def load_splits(path: str, names: Sequence[str], bad: BadRecords | None = None) -> dict[str, list[Record]]:
    """Reads several splits; all but the first are left out where the data does not have them.

    Raises:
      UserError: the first split is not there, or a record is malformed.
    """
    found = {names[0]: load_records(path, names[0], bad)}
    for name in names[1:]:
        with contextlib.suppress(AbsentSplit):
            found[name] = load_records(path, name, bad)
    return found


def load_training(
    data: DataConfig, reported: dict[str, list[Record]], bad: BadRecords | None = None
) -> tuple[Iterator[Record], list[Record]]:
    """Reads the records that are trained on, and those that pick the best checkpoint.

    Args:
      data: Names the split to train on and where the other comes from: a split, or `auto`, one user in twenty (two
        at least) by a hash of the user id, of those whom no reported split has.
      reported: Records by split.
      bad: The policy for malformed records.

    Returns:
      Records of different users, the former read as they are asked for; the latter are none where there are too few
      users to spare.

    Raises:
      UserError: a split is not there, or a record is malformed.
    """

    def records() -> Iterator[Record]:
        return stream_records(data.path, data.train_split, bad)

    if data.dev_split != "auto":
        return records(), load_records(data.path, data.dev_split, bad)
    shown = {record.user_id for others in reported.values() for record in others}
    is_chosen = hold_out(record.user_id for record in records() if record.user_id not in shown)

    def is_dev(record: Record) -> bool:
        return is_chosen(record.user_id) and record.user_id not in shown

    return (record for record in records() if not is_dev(record)), [record for record in records() if is_dev(record)]


def _open_prepared(place: Path) -> "tfds.core.DatasetBuilder":
    if not (place / "dataset_info.json").is_file():
        raise UserError(f"{place}: not a prepared dataset; run `e2p prepare`, and give the directory that it prints")
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(place)
    if set(builder.info.features) | {"items"} != set(FIELDS):  # earlier versions wrote none
        raise UserError(
            f"{place}: its examples have {sorted(builder.info.features)}, not {sorted(FIELDS)}; "
            "give a directory that `e2p prepare` wrote"
        )
    return builder


def _read_prepared(place: Path, split: str) -> Iterator[Record]:
    builder = _open_prepared(place)
    if split not in builder.info.splits:
        raise AbsentSplit(f"{place}: no split {split!r}; there are {', '.join(builder.info.splits)}")
    if builder.info.splits[split].num_examples == 0:
        return
    for row, values in enumerate(builder.as_data_source(split)):
        yield _from_example(values, f"{place} {split}[{row}]")


def _from_example(values: dict[str, Any], source: str) -> Record:
    """A decoded TFDS example, whose texts are bytes, -> `Record`; TFDS turns a list of messages into two lists."""

    def texts(column: Iterable[bytes]) -> tuple[str, ...]:
        return tuple(text.decode("utf-8") for text in column)

    messages = zip(texts(values["messages"]["role"]), texts(values["messages"]["content"]), strict=True)
    return Record(
        user_id=values["user_id"].decode("utf-8"),
        context=texts(values["context"]),
        messages=tuple({"role": role, "content": content} for role, content in messages),
        candidates=texts(values["candidates"]),
        references=texts(values["references"]),
        source=source,
        items=texts(values.get("items", ())),
    )
