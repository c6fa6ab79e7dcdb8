"""Outputs appear whole or not at all: written beside their place under a temporary name, then moved in.

A run directory may be in a bucket, as `gs://BUCKET/NAME`: there an object that is written is whole or absent by itself,
nothing is appended or renamed, and gcsfs does the work behind `epath.Path`, which is a pathlib path on this machine.
"""

import contextlib
import errno
import hashlib
import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from e2p_jax.errors import UserError, shown
from e2p_jax.locks import locked


def user_cache() -> Path:
    """Gives the folder for what can be made again, kept between commands."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e2p_jax"


def existing(name: str | os.PathLike[str], what: str, *, only_file: bool = False) -> Path:
    """The file or directory of a name that a user gave; `~` is their home.

    Args:
      what: for errors, the flag or setting that named it.
      only_file: a directory is refused.

    Raises:
      UserError: nothing that may be read is there, or the name is none that a file can have.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
        reason = "" if os.access(path, os.R_OK) else "it may not be read"
        reason = "it is a directory" if only_file and path.is_dir() else reason
    except FileNotFoundError as error:
        raise UserError(f"{what}: {os.fspath(name)} does not exist") from error
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, nobody's home
        reason = str(getattr(error, "strerror", None) or error)
    if reason:
        raise UserError(f"{what}: {shown(os.fspath(name))} cannot be opened ({reason}); give another path")
    return path


def in_bucket(path: epath.PathLike) -> bool:
    return os.fspath(path).startswith("gs://")


def run_directory(place: epath.PathLike) -> epath.Path:
    """A directory of this machine, or `gs://BUCKET/NAME`: whatever there is to be read or written in a run starts here.

    Raises:
      UserError: gcsfs is not installed, or the bucket cannot be listed.
    """
    path = epath.Path(place)
    if in_bucket(path):
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(f"{path}: run directories in buckets need gcsfs; pip install 'e2p-jax[gcs]'")
        import fsspec.config

        # What TensorStore or another host writes must be seen here at once.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        try:
            path.exists()
        except Exception as error:  # gcsfs, google-auth and aiohttp each raise their own
            raise UserError(
                f"{path}: cannot be listed ({error}); check the bucket's name, and that this account may list, "
                "read and write there (gcloud auth application-default login)"
            ) from error
    return path


def _refuse_bucket(path: Path | epath.Path) -> None:
    if path.parts[:1] == ("gs:",):  # what pathlib leaves of gs://
        raise UserError(f"{path}: only run directories can be in a bucket; write to a directory, and copy that")


def file_digest(path: epath.PathLike) -> str:
    """SHA-256 of what a file holds."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a file atomically, creating its folder."""
    path = epath.Path(path)
    if in_bucket(path):
        path.write_bytes(data)
        return
    _refuse_bucket(path)
    with replace_file(Path(path)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file that takes the place of `path` when the block ends without an error.

    It waits for other processes that write `path`. What a killed one left goes: its name is always the same.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with locked(temporary):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: epath.PathLike, text: str) -> None:
    """The same, in UTF-8."""
    write_bytes(path, text.encode())


def move_directory(old: epath.Path, new: epath.Path) -> None:
    """To a place where nothing is; in a bucket object by object, on the server."""
    if in_bucket(old):
        import fsspec

        fsspec.filesystem("gcs").mv(str(old), str(new), recursive=True)
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    old.rename(new)


class LineFile:
    """A file that grows by lines: each is there at once, in a bucket with the next `sync`, which writes it whole."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._file: Any = io.BytesIO() if in_bucket(path) else Path(path).open("ab", buffering=0)  # noqa: SIM115
        if in_bucket(path) and path.exists():
            self._file.write(path.read_bytes())

    def write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")  # one write: whole, or an error here and now

    def sync(self) -> None:
        """Makes everything so far durable."""
        if in_bucket(self._path):
            self._path.write_bytes(self._file.getvalue())
        else:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if in_bucket(self._path):
            self.sync()
        self._file.close()


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that takes the place of `path` when the block ends without an error.

    It waits for other commands that write `path`, and clears away what a killed one left.

    Raises:
      UserError: `path` is a file, cannot be written, or holds anything that the new directory has no newer version of;
        the disk is full. What was there stays.
    """
    _refuse_bucket(path)
    with contextlib.ExitStack() as held, explain_refusal(path):
        path = path.resolve()
        refuse_other_files(path, lambda name: True)
        work = path.with_name(f".{path.name}.writing")
        lock, new, old = work / "lock", work / "new", work / "old"
        held.enter_context(locked(lock))
        held.callback(_leave, work, path)
        _clear(new, old, path)
        new.mkdir()
        held = held.pop_all()
    with held:
        with explain_full_disk(path):
            yield new
        with explain_refusal(path):
            if path.exists():
                refuse_other_files(path, {p.name for p in new.iterdir()}.__contains__)
                path.rename(old)
            new.rename(path)


def refuse_other_files(path: Path, ours: Callable[[str], bool]) -> None:
    """Refuses before the work a directory that `replace_directory` would refuse after it.

    Args:
      ours: whether a file of this name is one that will be written there again.

    Raises:
      UserError: there is another file in it, or it is one.
    """
    with explain_refusal(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, and a directory is to be written there; choose another place")
        foreign = sorted(p.name for p in path.iterdir() if not ours(p.name)) if path.is_dir() else []
    if foreign:
        raise UserError(f"{path}: holds other files ({', '.join(foreign[:3])}); choose an empty or new directory")


def _clear(new: Path, old: Path, path: Path) -> None:
    """Brings back the version of before, which a kill between the two renames leaves in `old` alone."""
    if old.exists() and not path.exists():
        old.rename(path)
    for directory in (new, old):
        shutil.rmtree(directory, ignore_errors=True)


def _leave(work: Path, path: Path) -> None:
    _clear(work / "new", work / "old", path)
    (work / "lock").unlink()
    with contextlib.suppress(OSError):  # the next process has it already
        work.rmdir()


@contextlib.contextmanager
def explain_refusal(path: epath.PathLike) -> Iterator[None]:
    """Turns what the system says to writing at a place that a user named into an error that names it.

    Raises:
      UserError: no such place can be written: too long, read-only, below a file, a ring of links, a full disk.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # the latter two: NUL or no name at all, and rings of links
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{os.fspath(path)}: cannot be written ({reason}); choose another place") from error


@contextlib.contextmanager
def explain_full_disk(directory: Path) -> Iterator[None]:
    """Turns the errors that libraries make of a full disk into one that says so.

    Raises:
      UserError: no space is left for `directory`.
    """
    try:
        yield
    except Exception as error:  # Orbax and TensorStore wrap it in types of their own
        told = f"{error} {error.__cause__}"
        full = any(os.strerror(code) in told for code in (errno.ENOSPC, errno.EDQUOT))
        if isinstance(error, UserError) or not full:
            raise
        raise UserError(
            f"{directory}: no space left on the device; what was saved before is whole. Make room and rerun the same "
            "command"
        ) from error
