"""Outputs appear whole or not at all: written beside their place under a temporary name, then moved in."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from e2p_jax.errors import UserError


def user_cache() -> Path:
    """Where what can be made again is kept between commands."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e2p_jax"


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that takes the place of `path` when the block ends without an error.

    Raises:
      UserError: `path` is a file, or holds anything that the new directory has no newer version of.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, and a directory is to be written there; choose another place")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        if path.exists():
            foreign = sorted({p.name for p in path.iterdir()} - {p.name for p in temporary.iterdir()})
            if foreign:
                names = ", ".join(foreign[:3])
                raise UserError(f"{path}: holds other files ({names}); choose an empty or new directory")
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def explain_full_disk(directory: Path) -> Iterator[None]:
    """Turns the errors that libraries make of a full disk into one that says so.

    Raises:
      UserError: no space is left for `directory`.
    """
    try:
        yield
    except Exception as error:  # Orbax and TensorStore wrap it in types of their own
        if isinstance(error, UserError) or "No space left on device" not in f"{error} {error.__cause__}":
            raise
        raise UserError(
            f"{directory}: no space left on the device; what was saved before is whole. Make room and rerun the same "
            "command to resume"
        ) from error
