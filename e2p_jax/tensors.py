"""Safetensors files (https://huggingface.co/docs/safetensors), read without a copy and written in shards.

Imports neither jax nor torch.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from e2p_jax.errors import UserError
from e2p_jax.json_files import object_in

SHARD_BYTES = 2 * 10**9

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}


_LONGEST_HEADER = 100_000_000  # bytes, as the format has it


def read_tensors(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """The tensors of a file, memory-mapped: eight bytes say how long the header is, little-endian; JSON; the tensors.

    Every byte after the header belongs to one tensor, as the format asks for: none overlap, nothing is left over.

    Args:
      remedy: what to do about a damaged file, the end of the error.

    Raises:
      UserError: missing, truncated or malformed.
    """

    def damaged(reason: Any) -> UserError:
        return UserError(f"{path}: missing or damaged safetensors ({reason}); {remedy}")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise damaged(f"{size} bytes, and a header of {length}")
            header = object_in(file.read(length))
        header.pop("__metadata__", None)
        entries = sorted(((_entry(entry), name) for name, entry in header.items()), key=lambda pair: pair[0][2:])
        mapped, tensors, end = np.memmap(path, np.uint8, "r"), {}, 0
        for (dtype, shape, first, last), name in entries:
            name.encode()  # half of a surrogate pair is no name
            if first != end:
                raise ValueError(f"{name} begins at byte {first}, and what stands before it ends at {end}")
            if math.prod(shape) * dtype.itemsize != last - first:
                raise ValueError(f"{name} has the wrong length")
            tensors[name], end = np.ndarray(shape, dtype, mapped, 8 + length + first), last
        if 8 + length + end != size:
            raise ValueError(f"its tensors end at byte {8 + length + end} of {size}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise damaged(error) from error
    return {name: tensors[name] for name in header}


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    first: int
    last: int  # bytes after the header


def _entry(entry: Any) -> _Entry:
    """
    Raises:
      ValueError, KeyError, TypeError: the header's entry of a tensor is not what the format has.
    """
    if type(entry["shape"]) is not list:
        raise TypeError(f"shape {entry['shape']!r}")
    numbers = [*entry["shape"], *entry["data_offsets"]]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"shape {entry['shape']!r} and data_offsets {entry['data_offsets']!r}")
    first, last = entry["data_offsets"]
    return _Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]), first, last)


def write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], most: float = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or shards of at most so many bytes, about, and the index that names them.

    Args:
      directory: an existing one.
      tensors: by name, each held until its shard is written.
    """
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        shards.append(directory / f"model-{len(shards) + 1:05d}.safetensors")
        save_file(held, shards[-1], metadata={"format": "pt"})
        shards[-1].chmod(0o644)  # the library writes it readable by its owner only
        held.clear()

    for name, tensor in tensors:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > most:
            flush()
        held[name] = np.ascontiguousarray(tensor)
        weight_map[name], total = len(shards), total + tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0].rename(directory / "model.safetensors")
        return
    names = [f"{shard.stem}-of-{len(shards):05d}.safetensors" for shard in shards]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[shard] for name, shard in sorted(weight_map.items())},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
