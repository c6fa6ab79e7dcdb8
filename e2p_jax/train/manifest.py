"""SHA-256 of every file of a checkpoint: a truncated file or a flipped byte is found before anything is restored."""

import hashlib
import json
from collections.abc import Iterator

from etils import epath

from e2p_jax.files import file_digest

NAME = "sha256.json"
# Orbax adds the time of the commit to it after everything else is written.
_CHANGES_AFTERWARDS = "_CHECKPOINT_METADATA"
_PARTS = ("state", "statistics", "data")
_OBJECTS = ("state/_METADATA", "statistics/_METADATA", "data/metadata", "metrics/metrics")  # of JSON, where they are


def write_manifest(directory: epath.Path) -> None:
    """Describes all files below `directory` as they are now."""
    sums = {name: file_digest(directory / name) for name in sorted(_files(directory, ""))}
    (directory / NAME).write_text(json.dumps(sums, indent=1) + "\n")


def find_damage(directory: epath.Path) -> str | None:
    """Says what is wrong with the files, or None: `state/d/0a.. differs from what was written`.

    A checkpoint without a manifest is taken as it is where it has its parts: nobody wrote down what they held.
    """
    if (directory / NAME).exists():
        sums = _object(directory / NAME)
        if not sums:
            return f"{NAME} is damaged"
        for name, written in sums.items():
            if not (directory / name).is_file():
                return f"{name} is missing"
            if file_digest(directory / name) != written:
                return f"{name} differs from what was written"
    for name in _PARTS:
        if not (directory / name).is_dir():
            return f"{name} is missing"
    for name in _OBJECTS:
        if (directory / name).exists() and _object(directory / name) is None:
            return f"{name} is damaged"
    return None


def _object(path: epath.Path) -> dict[str, str] | None:
    """Of a file of JSON; None where it holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def digest(directory: epath.Path) -> str:
    """SHA-256 over what the files below `directory` were when they were written: of the manifest, if there is one."""
    if (directory / NAME).exists():
        return file_digest(directory / NAME)
    sums = {name: file_digest(directory / name) for name in sorted(_files(directory, ""))}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _files(directory: epath.Path, prefix: str) -> Iterator[str]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif path.name not in (NAME, _CHANGES_AFTERWARDS):
            yield prefix + path.name
