"""The forms that Persona-Chat and its relatives are published in: which files, and how each is read."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.persona_chat import exports, generated, parlai
from e2p_jax.datasets.persona_chat.dialogues import Dialogue, Whose
from e2p_jax.errors import UserError

PARTS = ("train", "valid", "test")

Files = list[tuple[str, Path]]  # part of the release, and the file it is in
Readings = Sequence[Sequence[Dialogue]]  # the dialogues of a file, once for each user who replies


@dataclasses.dataclass(frozen=True)
class Form:
    """The layout of a release."""

    files: Callable[[Path], Files]  # of a directory; raises UserError where one is missing
    read: Callable[[Path, str, BadRecords], Readings]  # of a file, for one of its parts
    vectors: tuple[str, ...] = ()  # endings of the names of the vector files, one for each reading
    has_parts: bool = True  # else some users are held out of the one part there is


def text(whose: Whose, wording: str, candidates: bool) -> Form:
    """ParlAI's text form: `train_self_original.txt` and so on."""
    stem = f"{whose}_{wording}"

    def files(directory: Path) -> Files:
        paths = {part: directory / f"{part}_{stem}.txt" for part in PARTS}
        if not candidates:  # the release may have them in files of their own
            bare = {part: directory / f"{part}_{stem}_no_cands.txt" for part in PARTS}
            paths = {part: bare[part] if bare[part].is_file() else path for part, path in paths.items()}
        if missing := [str(paths[part]) for part in ("train", "valid") if not paths[part].is_file()]:
            raise UserError(
                f"{', '.join(missing)}: not found; part of the ConvAI2 (Persona-Chat) release, which ParlAI downloads"
            )
        return [(part, path) for part, path in paths.items() if path.is_file()]

    def read(path: Path, part: str, bad: BadRecords) -> Readings:
        return [parlai.read_dialogues(path, bad, whose)]

    return Form(files, read, ("",) if whose == "self" else ())


def _training_files(directory: Path) -> Files:
    path = directory / "personachat_self_original.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; ConvAI2's training data as JSON")
    return [(part, path) for part in ("train", "valid")]


def _evaluation_files(directory: Path) -> Files:
    if found := [path for name in exports.EVALUATIONS if (path := directory / name).is_file()]:
        return [("train", path) for path in found]
    raise UserError(f"{directory}: holds none of {', '.join(exports.EVALUATIONS)}; add one")


def _generated_files(directory: Path) -> Files:
    prefix = "Synthetic-Persona-Chat_"
    paths = [(part, directory / f"{start}{part}.csv") for part in PARTS for start in (prefix, "")]
    found = [(part, path) for part, path in paths if path.is_file()]
    if not found or len(found) > len(dict(found)):
        raise UserError(
            f"{directory}: must hold train.csv, valid.csv or test.csv of Synthetic-Persona-Chat, each once, with or "
            f"without {prefix!r} in front; it holds {[path.name for _, path in found]}"
        )
    return found


def _read_generated(path: Path, part: str, bad: BadRecords) -> Readings:
    return list(zip(*generated.read_both(path, bad), strict=True))


TRAINING_JSON = Form(_training_files, lambda path, part, bad: [exports.read_training(path, part, bad)], ("",))
EVALUATION_JSON = Form(_evaluation_files, lambda path, part, bad: [exports.read_evaluation(path, bad)], has_parts=False)
GENERATED = Form(_generated_files, _read_generated, ("_user1", "_user2"))
