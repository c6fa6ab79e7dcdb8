"""NumPy files of others: checked from their headers before anything is read, and never unpickled."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e2p_jax.errors import UserError

_LARGE = 1 << 28  # bytes in memory that any file may ask for
_DENSEST = 100  # times its size in the file that a larger array may have: numbers of vectors give 2, ids 10


def map_array(path: Path) -> np.ndarray:
    """The array of a .npy, as a read-only memory map.

    Raises:
      UserError: it is damaged, holds objects, or is longer or shorter than its header says.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if not isinstance(array, np.memmap) or array.offset + array.nbytes != path.stat().st_size:
            raise ValueError(f"{path.stat().st_size} bytes are not what its header says")
    except Exception as error:  # NumPy reads a damaged header as Python: whatever that raises
        raise _unreadable(path, error) from error
    return array


def read_members(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a .npz that are asked for; nothing else of it is read.

    Raises:
      UserError: it is damaged, lacks an array, holds objects, or would take far more memory than its size lets expect.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            members = {name: [info for info in infos if info.filename == f"{name}.npy"] for name in names}
            if any(len(found) != 1 for found in members.values()):
                wanted = " and ".join(f"`{name}`" for name in names)
                has = sorted(info.filename.removesuffix(".npy") for info in infos if info.filename.endswith(".npy"))
                raise UserError(f"{path}: needs the arrays {wanted}, has {has[:20]}; save each once, with np.savez")
            for (info,) in members.values():
                _check(path, archive, info)
            return {name: _read(archive, found[0]) for name, found in members.items()}
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each raise their own, and Python's for a damaged header
        raise _unreadable(path, error) from error


def refuse_inflation(path: Path, what: str, in_memory: int, in_file: int) -> None:
    """
    Raises:
      UserError: `what` takes so much more memory than file that it is a mistake or an attack.
    """
    if in_memory > max(_LARGE, _DENSEST * in_file):
        raise UserError(
            f"{path}: {what} takes {in_memory / 1e6:,.0f} MB, from {in_file / 1e6:,.1f} MB in the file, which no "
            "vectors or ids do; if it is right, save it without compression"
        )


def first_line(error: Exception) -> str:
    """The first line of its message, or its kind."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _check(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """That a member's header agrees with its size, and its size with what it takes in the file."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of format version {version}")
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=0) < 0 or file.tell() + size != info.file_size:
            raise ValueError(f"{info.filename} has shape {shape}, dtype {dtype} and {info.file_size} bytes")
    refuse_inflation(path, f"`{info.filename.removesuffix('.npy')}`", size, info.compress_size)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # the end, where the checksum is compared
    return array


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: unreadable ({first_line(error)}); save plain arrays of numbers and text, not objects")
