"""TFDS builder of Persona-Chat, in each of the forms it is published in, and the table of its users' vectors."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from e2p_jax.datasets.builder import RecordBuilder, RecordConfig
from e2p_jax.datasets.persona_chat import release
from e2p_jax.datasets.persona_chat.dialogues import Dialogue, Whose, user_id
from e2p_jax.datasets.records import Record, hold_out
from e2p_jax.errors import UserError
from e2p_jax.vectors.arrays import map_array
from e2p_jax.vectors.table import save_table

_SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # part of the release -> split
_ABOUT: dict[Whose, str] = {
    "self": "of the one who replies",
    "other": "of the one who is replied to",
    "both": "of both, each sentence labelled",
}


@dataclasses.dataclass(eq=False)
class PersonaConfig(RecordConfig):
    """The form that is read, and what stands for a user."""

    form: release.Form = release.TRAINING_JSON
    whose: Whose = "self"
    candidates: bool = True


def _text_config(whose: Whose, wording: str, candidates: bool) -> PersonaConfig:
    return PersonaConfig(
        name=f"{whose}_{wording}" + ("" if candidates else "_no_cands"),
        description=f"Persona {_ABOUT[whose]}, {wording} wording, {'with' if candidates else 'without'} candidates.",
        form=release.text_form(whose, wording, candidates),
        whose=whose,
        candidates=candidates,
    )


class Builder(RecordBuilder):
    """Splits, where the files have them: `train`; `validation`, whose users the release keeps out of its training file;
    `test`; `validation_seen`, the last dialogue of every user with two or more in the training file, taken out of
    `train`; `validation_ranking`, every turn of `validation` that has candidates.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        *(
            _text_config(whose, wording, c)
            for whose in _ABOUT
            for wording in ("original", "revised")
            for c in (True, False)
        ),
        PersonaConfig(name="convai2_json", description="ConvAI2's training data as JSON.", form=release.TRAINING_JSON),
        PersonaConfig(
            name="convai2_evaluation",
            description="ConvAI2's human evaluation as JSON: people who play a persona and talk to bots.",
            form=release.EVALUATION_JSON,
        ),
        PersonaConfig(
            name="synthetic",
            description="Synthetic-Persona-Chat as CSV: both users of dialogues that a language model wrote.",
            form=release.GENERATED,
        ),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""train_CONFIG.txt and valid_CONFIG.txt of the ConvAI2 release; for convai2_json
        personachat_self_original.json; for convai2_evaluation {" or ".join(release.EVALUATIONS)}; for synthetic
        train.csv, valid.csv or test.csv of Synthetic-Persona-Chat."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self._record_info(
            description="Dialogues of people who play a given persona, in 3 to 5 sentences.",
            homepage="https://aclanthology.org/P18-1205",
            citation="Zhang et al. (2018). Personalizing Dialogue Agents: I have a dog, do you have pets too? ACL.",
            license="CC BY 4.0",
        )

    def sources(self, directory: Path) -> list[Path]:
        """The dialogues, and their vectors where there are any."""
        config: PersonaConfig = self.builder_config
        texts = dict.fromkeys(path for _, path in config.form.files(directory))
        vectors = [path for paths in self._vectors(directory).values() for path in paths]
        there = [path for path in vectors if path.is_file()]
        if there and len(there) < len(vectors):
            missing = " and ".join(path.name for path in vectors if path not in there)
            raise UserError(f"{there[0]}: needs {missing} beside it, one row a dialogue; add what is missing")
        return [*texts, *there]

    def _vectors(self, directory: Path) -> dict[str, list[Path]]:
        """Part -> where the vectors of those who reply would lie."""
        form = self.builder_config.form
        parts = dict.fromkeys(part for part, _ in form.files(directory))
        return {part: [directory / f"{part}_embeddings{ending}.npy" for ending in form.vectors] for part in parts}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        config: PersonaConfig = self.builder_config
        directory = Path(dl_manager.manual_dir)
        dialogues: dict[str, list[Dialogue]] = {}
        vectors: list[tuple[Path, int, Sequence[Dialogue]]] = []
        for part, path in config.form.files(directory):
            readings = config.form.read(path, part, self.bad)
            _, count = list(self.bad.files.values())[-1]  # of the file just read, bad ones included
            for reading in readings:
                dialogues.setdefault(part, []).extend(reading)
            paths = self._vectors(directory)[part]
            vectors += [(path, count, reading) for path, reading in zip(paths, readings, strict=False)]
        if vectors and all(path.is_file() for path, *_ in vectors):
            first = config.name == self.BUILDER_CONFIGS[0].name
            table = Path(self.data_dir_root) / self.name / ("embeddings" if first else f"embeddings_{config.name}")
            save_vectors(vectors, table, self.info.full_name, str(self.VERSION))
        splits = self._splits(dialogues)
        return {name: self._generate_examples(records) for name, records in splits.items() if records}

    def _splits(self, dialogues: dict[str, list[Dialogue]]) -> dict[str, list[Record]]:
        config: PersonaConfig = self.builder_config
        answered = {part: [each for each in said if each.turns] for part, said in dialogues.items()}
        silent = sum(map(len, dialogues.values())) - sum(map(len, answered.values()))
        self.left_out["dialogues in which the user answers nothing"] = silent
        splits = {_SPLITS[part]: [each.record(config.whose) for each in said] for part, said in answered.items()}
        if config.form.has_parts:
            splits["train"], splits["validation_seen"] = _hold_out(splits.get("train", []))
        else:
            is_held_out = hold_out(record.user_id for record in splits["train"])
            splits["validation"] = [record for record in splits["train"] if is_held_out(record.user_id)]
            splits["train"] = [record for record in splits["train"] if not is_held_out(record.user_id)]
        if not config.candidates:
            return {name: [dataclasses.replace(r, candidates=()) for r in records] for name, records in splits.items()}
        rankings = [record for dialogue in answered.get("valid", []) for record in dialogue.rankings(config.whose)]
        return {**splits, "validation_ranking": rankings}


def _hold_out(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The rest, and the last dialogue of every user who has several."""
    users = [record.user_id for record in records]
    last = {user: row for row, user in enumerate(users)}
    counts = collections.Counter(users)
    held_out = {row for user, row in last.items() if counts[user] > 1}
    rest = [record for row, record in enumerate(records) if row not in held_out]
    return rest, [records[row] for row in sorted(held_out)]


def save_vectors(parts: Sequence[tuple[Path, int, Sequence[Dialogue]]], table: Path, name: str, version: str) -> None:
    """Writes one row per user, the mean of its dialogues' rows.

    Args:
      parts: File of vectors, how many dialogues it must have rows for, and those whose users are in the table.
      table: Directory to write.
      name: Of the table.
      version: Of the table.

    Raises:
      UserError: a file is not [dialogues, width] floats, the widths differ, or a row is not finite.
    """
    read = [_read(path, count, dialogues) for path, count, dialogues in parts]
    widths = sorted({vectors.shape[1] for vectors in read})
    if len(widths) > 1:
        names = " and ".join(path.name for path, *_ in parts)
        raise UserError(f"{parts[0][0].parent}: {names} have different widths, {' and '.join(map(str, widths))}")
    ids = [user_id(dialogue.persona) for *_, dialogues in parts for dialogue in dialogues]
    users, rows = np.unique(ids, return_inverse=True)
    sums = np.zeros((len(users), widths[0]), np.float64)
    np.add.at(sums, rows, np.concatenate(read))
    means = sums / np.bincount(rows)[:, None]
    save_table(table, users.tolist(), means.astype(np.float32), name=name, version=version)


def _read(path: Path, count: int, dialogues: Sequence[Dialogue]) -> np.ndarray:
    """[len(dialogues), E] of any float type."""
    vectors: np.ndarray = map_array(path)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise UserError(f"{path}: {vectors.dtype} of shape {vectors.shape}, expected floats [dialogues, width]")
    if len(vectors) != count:
        raise UserError(f"{path}: {len(vectors)} rows for {count} dialogues; row i must belong to dialogue i")
    vectors = vectors[[dialogue.number for dialogue in dialogues]]
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        dialogue = dialogues[bad[0]]
        raise UserError(f"{path}: row {dialogue.number} ({dialogue.source}) holds NaN or infinity; repair it")
    return vectors
