"""The format: metadata and a table of tensors in front of their bytes. Nothing of the weights is read here.

`gguf.GGUFReader` is not used: it keeps an array for every string, and takes half a minute over a vocabulary of 262144.
"""

import math
import mmap
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from e2p_jax.errors import UserError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_REMEDY = "download it again"


class Stored(NamedTuple):
    """A tensor of the file."""

    shape: tuple[int, ...]  # outermost first
    kind: int  # of ggml: how a block of numbers is stored
    data: np.ndarray  # [rows, bytes a row] uint8, mapped; a row is all along the last axis


class GgufFile(NamedTuple):
    """What stands in a file, or in the parts of one."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def text(self, key: str) -> str:
        """
        Raises:
          UserError: the metadata has no text there.
        """
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise UserError(f"{self.path}: its metadata has no {key}; {_REMEDY}")
        return value

    def token(self, name: str) -> int | None:
        """The id of a token with a name, `bos` or `eos`, where the file has one.

        Raises:
          UserError: what is there is no id.
        """
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.metadata.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise UserError(f"{self.path}: {key} is {str(value)[:60]}, and no token's id; {_REMEDY}")
        return value


def gguf_package(path: Path) -> ModuleType:
    """The package `gguf`.

    Raises:
      UserError: not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path}: reading GGUF needs the package gguf; pip install 'e2p-jax[gguf]'") from error
    return gguf


class _Bytes:
    """Reads forward."""

    def __init__(self, held: mmap.mmap):
        self.held, self.place = held, 0

    def take(self, count: int) -> bytes:
        end = self.place + count
        if end > len(self.held):
            raise ValueError(f"it ends at byte {len(self.held)}, in the middle of something")
        taken, self.place = self.held[self.place : end], end
        return taken

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        pattern = f"<{count}{letter}"
        return struct.unpack(pattern, self.take(struct.calcsize(pattern)))

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _NUMBERS:
                return list(self.numbers(_NUMBERS[inner], count))
            if inner != _STRING:
                raise ValueError(f"an array of type {inner}")
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}")
        return self.number(_NUMBERS[kind])


def read_file(path: Path) -> GgufFile:
    """A file's metadata, and its tensors memory-mapped.

    Raises:
      UserError: the package gguf is absent; not a GGUF file, a part of one, damaged, or stored in a way unknown here.
    """
    sizes = gguf_package(path).GGML_QUANT_SIZES
    try:
        with path.open("rb") as file:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = _Bytes(held)
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = reader.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or big-endian; 2 and 3 are known")
        tensor_count, pairs = reader.numbers("Q", 2)
        metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(pairs)}
        table = []
        for _ in range(tensor_count):
            name, axes = reader.text(), reader.number("I")
            shape = reader.numbers("Q", axes)[::-1]
            table.append((name, shape, *reader.numbers("I", 1), *reader.numbers("Q", 1)))
        alignment = metadata.get("general.alignment", 32)
        begin = -(-reader.place // alignment) * alignment
        whole, tensors = np.frombuffer(held, np.uint8), {}
        for name, shape, kind, offset in table:
            if kind not in sizes:
                raise ValueError(f"{name} is of type {kind}, which the installed gguf package does not know")
            block, nbytes = sizes[kind]
            width = shape[-1] if shape else 1
            if width % block or name in tensors:
                raise ValueError(f"{name} of shape {shape} in blocks of {block}, or twice")
            rows, row = math.prod(shape) // max(1, width), width // block * nbytes
            data = whole[begin + offset : begin + offset + rows * row]
            tensors[name] = Stored(tuple(shape), kind, data.reshape(rows, row))
    except (OSError, ValueError, TypeError, ArithmeticError, struct.error, MemoryError) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error}); {_REMEDY}") from error
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path}: one part of several; join them first, with llama.cpp's llama-gguf-split --merge")
    return GgufFile(path, metadata, tensors)
