"""Safetensors files (https://huggingface.co/docs/safetensors), read without a copy and written in shards.

Imports neither jax nor torch.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from e2p_jax.errors import UserError

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


def read_tensors(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """The tensors of a file, memory-mapped: eight bytes say how long the header is, little-endian; JSON; the tensors.

    Args:
      remedy: what to do about a damaged file, the end of the error.

    Raises:
      UserError: missing, truncated or malformed.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        mapped, tensors = np.memmap(path, np.uint8, "r"), {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            dtype, start = DTYPES[entry["dtype"]], 8 + length + first
            tensors[name] = np.ndarray(tuple(entry["shape"]), dtype, mapped, start)
            if tensors[name].nbytes != last - first:
                raise ValueError(f"{name} has the wrong length")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: missing or damaged safetensors ({error}); {remedy}") from error
    return tensors


def write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes `model.safetensors`, or shards of about `SHARD_BYTES` and the index that names them.

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
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > SHARD_BYTES:
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
