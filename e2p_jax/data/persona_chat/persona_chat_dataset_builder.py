"""TFDS builder of Persona-Chat from ParlAI's text form, and the table of its users' vectors."""

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from e2p_jax.data.builder import RecordBuilder, RecordConfig
from e2p_jax.data.embeddings import save_table
from e2p_jax.data.persona_chat.parlai import read_dialogues
from e2p_jax.data.records import Record
from e2p_jax.errors import UserError

_PARTS = ("train", "valid")
_WHERE = "part of the ConvAI2 (Persona-Chat) release, which ParlAI downloads"


class Builder(RecordBuilder):
    """Splits: `train`; `validation`, whose users the release keeps out of its training file; `validation_seen`, the
    last dialogue of every user with two or more in that file, taken out of `train` (absent where no user has two).
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        RecordConfig(name="self_original", description="The persona as its owner wrote it."),
        RecordConfig(name="self_revised", description="The persona in other words than the dialogue's."),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"train_CONFIG.txt and valid_CONFIG.txt, {_WHERE}."

    def _info(self) -> tfds.core.DatasetInfo:
        return self._record_info(
            description="Dialogues of crowd workers who play a given persona, in 3 to 5 sentences.",
            homepage="https://aclanthology.org/P18-1205",
            citation="Zhang et al. (2018). Personalizing Dialogue Agents: I have a dog, do you have pets too? ACL.",
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        directory = Path(dl_manager.manual_dir)
        dialogues = {part: read_dialogues(directory / _text(part, self.builder_config)) for part in _PARTS}
        first = self.builder_config is self.BUILDER_CONFIGS[0]
        table = "embeddings" if first else f"embeddings_{self.builder_config.name}"
        _save_vectors(directory, dialogues, Path(self.data_dir_root) / self.name / table, self.info.full_name)
        train, seen = _hold_out(dialogues["train"])
        splits = {"train": train, "validation": dialogues["valid"], "validation_seen": seen}
        return {name: self._generate_examples(records) for name, records in splits.items() if records}

    def sources(self, directory: Path) -> list[Path]:
        return sources(directory, self.builder_config)


def sources(directory: Path, config: tfds.core.BuilderConfig) -> list[Path]:
    """The original files: two texts, and the vectors of their dialogues where there are any.

    Raises:
      UserError: naming the file that is missing.
    """
    texts = [directory / _text(part, config) for part in _PARTS]
    vectors = [directory / _vectors(part) for part in _PARTS]
    if missing := [str(path) for path in texts if not path.is_file()]:
        raise UserError(f"{', '.join(missing)}: not found; {_WHERE}")
    there = [path for path in vectors if path.is_file()]
    if len(there) == 1:
        raise UserError(f"{there[0]}: needs {' and '.join(p.name for p in vectors)}, one row a dialogue; add the other")
    return texts + there


def _text(part: str, config: tfds.core.BuilderConfig) -> str:
    return f"{part}_{config.name}.txt"


def _vectors(part: str) -> str:
    return f"{part}_embeddings.npy"


def _hold_out(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The rest, and the last dialogue of every user who has several."""
    users = [record.user_id for record in records]
    last = {user: row for row, user in enumerate(users)}
    counts = collections.Counter(users)
    held_out = {row for user, row in last.items() if counts[user] > 1}
    rest = [record for row, record in enumerate(records) if row not in held_out]
    return rest, [records[row] for row in sorted(held_out)]


def _save_vectors(directory: Path, dialogues: dict[str, list[Record]], table: Path, name: str) -> None:
    """Writes one row per user, the mean of its dialogues' rows, if the dialogues have vectors."""
    if not (directory / _vectors("train")).is_file():
        return
    parts = [_read_vectors(directory / _vectors(part), records) for part, records in dialogues.items()]
    if parts[0].shape[1] != parts[1].shape[1]:
        widths = " and ".join(str(part.shape[1]) for part in parts)
        raise UserError(f"{directory}: {' and '.join(map(_vectors, _PARTS))} have different widths, {widths}")
    users, rows = np.unique([r.user_id for records in dialogues.values() for r in records], return_inverse=True)
    sums = np.zeros((len(users), parts[0].shape[1]), np.float64)
    np.add.at(sums, rows, np.concatenate(parts))
    means = sums / np.bincount(rows)[:, None]
    save_table(table, users.tolist(), means.astype(np.float32), name=name, version=str(Builder.VERSION))


def _read_vectors(path: Path, records: Sequence[Record]) -> np.ndarray:
    """[dialogues, E] of any float type."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a NumPy array of numbers ({str(error).splitlines()[0]})") from error
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise UserError(f"{path}: {vectors.dtype} of shape {vectors.shape}, expected floats [dialogues, width]")
    if len(vectors) != len(records):
        raise UserError(f"{path}: {len(vectors)} rows for {len(records)} dialogues; row i must belong to dialogue i")
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        raise UserError(f"{path}: row {bad[0]} ({records[bad[0]].source}) holds NaN or infinity; repair it")
    return vectors
