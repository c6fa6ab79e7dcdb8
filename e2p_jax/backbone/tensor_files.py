"""A Hugging Face directory's tensors: opened, held against the decoder, read piece by piece, fingerprinted."""

import contextlib
import functools
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2p_jax.backbone.layout import DecoderConfig, layers_with, tensor_names
from e2p_jax.backbone.lazy import Lazy
from e2p_jax.errors import UserError
from e2p_jax.files import user_cache, write_text
from e2p_jax.json_files import is_digest, read_object
from e2p_jax.tensors import read_tensors

_TICK_NS = 50_000_000  # a file changed twice within a tick of the file system's clock shows one time


class Checkpoint:
    """The tensors of a model directory: one `model.safetensors`, or shards named by an index."""

    duplicates: dict[str, Path]
    """Name -> a further shard that has it."""

    def __init__(self, directory: Path):
        """Opens every shard and checks its length.

        Raises:
          UserError: no safetensors, or a shard missing, truncated or malformed.
        """
        shards = _shards(directory)
        stored: dict[str, np.ndarray] = {}
        duplicates: dict[str, Path] = {}
        for shard in shards:
            if not shard.is_file():
                raise UserError(f"{shard}: not found; a backbone needs its weights as safetensors")
        opened = stamp(shards)
        for shard in shards:
            held = read_tensors(shard, "download it again")
            duplicates |= dict.fromkeys(held.keys() & stored.keys(), shard)
            stored |= held
        if not stored:
            raise UserError(f"{directory}: the safetensors hold no tensors")
        self._hold(directory, shards, opened, stored, stored)
        self.duplicates = duplicates

    def _hold(
        self,
        directory: Path,
        shards: list[Path],
        opened: str,
        stored: dict[str, np.ndarray],
        tensors: Mapping[str, np.ndarray | Lazy],
    ) -> None:
        """
        Args:
          opened: the files' stamp before anything of them was read.
          stored: what the files hold, by their own names, memory-mapped: what a fingerprint is of.
          tensors: what it stands for, by Hugging Face's names.
        """
        self.directory, self.shards, self._opened = directory, shards, opened
        self.stored, self.tensors = stored, tensors

    def names(self) -> set[str]:
        return set(self.tensors)

    @property
    def worked_out(self) -> bool:
        """Whether tensors are not in the files as they are read: quantised, permuted or under other names."""
        return self.tensors is not self.stored

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(tensor.nbytes for tensor in self.tensors.values())

    def check(self, config: DecoderConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        """Holds the tensors against the decoder's parameters.

        Args:
          config: read from `config.json`.
          shapes: parameter path -> stacked shape.

        Raises:
          UserError: listing all missing, unexpected, duplicated and misshapen tensors together.
        """
        present = self.names()
        spelled = spelling(config, present)
        self.parts = parts(config, shapes, spelled)
        wanted: dict[str, tuple[int, ...]] = {}
        for path, part in self.parts.items():  # of the parameters in one tensor, the last one ends it
            experts, (rows, *width) = part.split(shapes[path][len(part.stack) :])
            shape = [part.start * part.groups + rows, *width]
            wanted |= dict.fromkeys(part.names().values(), (*experts, *(shape[::-1] if part.transposed else shape)))
        # A tied head may be saved as well; rotary tables and GPT-2's causal masks are buffers of old exports.
        head = spelled("lm_head.weight")
        ignored = {head} if config.tie_head else set()
        buffers = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
        extra = {name for name in present - wanted.keys() - ignored if not name.endswith(buffers)}
        further = self.parts["layers/q"].template.partition("{}")[0]
        behind = tuple(f"{further}{config.num_layers + number}." for number in range(config.further_layers))
        extra = {name for name in extra if not name.startswith((*behind, LATER))}
        if config.wrapped:
            extra = {name for name in extra if spelled.plain(name)}
        problems = [f"missing {name}" for name in sorted(wanted.keys() - present)]
        problems += [f"unexpected {name}" for name in sorted(extra)]
        problems += [f"{name} also stands in {shard.name}" for name, shard in sorted(self.duplicates.items())]
        for name in sorted(wanted.keys() & present):
            if self.tensors[name].shape != tuple(wanted[name]):
                problems.append(f"{name} has shape {self.tensors[name].shape}, config.json says {tuple(wanted[name])}")
        embedding = self.parts["embedding"].template
        if not problems and ignored & present and not np.array_equal(self.tensors[head], self.tensors[embedding]):
            problems.append(f"{head} is not {embedding}, which tie_word_embeddings says it is")
        if problems:
            raise UserError(f"{self.directory}: weights and config.json disagree: {'; '.join(problems)}")

    def dtype(self, path: str) -> jnp.dtype:
        """The narrowest dtype that holds all of a parameter's tensors, once checked."""
        with jax.numpy_dtype_promotion("standard"):
            return jnp.dtype(jnp.result_type(*{self.tensors[n].dtype for n in self.parts[path].names().values()}))

    def pieces(self, path: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Iterator[jax.Array]:
        """A parameter in order, each layer [1, ...] by itself, in the dtype of its tensors; once checked.

        Only what this host's devices hold is read.
        """
        part, dtype = self.parts[path], self.dtype(path)
        names = list(part.names().values())
        each = len(names) // (part.stack[0] if part.stack else 1)
        for start in range(0, len(names), each):
            whole = [self.tensors[name] for name in names[start : start + each]]
            tensors = [part.rows(tensor, shape[len(part.stack) :]) for tensor in whole]
            piece = (1, *shape[1:]) if part.stack else shape
            yield jax.make_array_from_callback(piece, sharding, functools.partial(_slice, tensors, dtype))

    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and SHA-256, in name order; independent of sharding.

        Kept in the user's cache, and taken from there for as long as no shard's inode, size and times change.
        """
        return kept("fingerprints", self.shards, self._opened, lambda: fingerprint(self.stored))


def stamp(files: Sequence[Path]) -> str:
    """Changes whenever a file is written or replaced, whatever time it is given afterwards."""
    stats = [(os.fsencode(file.resolve()).hex(), file.stat()) for file in files]
    return "\n".join(f"{path} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for path, s in stats)


def kept(kind: str, files: Sequence[Path], opened: str, find: Callable[[], str]) -> str:
    """A digest of what files hold: taken from the user's cache while their stamp stays, else found and put there.

    What is in the cache is believed only with its own checksum, over the digest and the stamp that it is of.

    Args:
      kind: folder of the cache.
      opened: the files' stamp before `find` first read anything of them.
      find: reads the files.
    """
    place = user_cache() / kind / hashlib.sha256(opened.encode()).hexdigest()

    def line(digest: str) -> str:
        return f"{digest} {hashlib.sha256(f'{opened} {digest}'.encode()).hexdigest()}\n"

    with contextlib.suppress(OSError, ValueError):
        known = place.read_text(encoding="ascii")
        if is_digest(known[:64]) and known == line(known[:64]):
            return known[:64]
    found = find()
    newest = max((file.stat().st_ctime_ns for file in files), default=0)
    if stamp(files) == opened and abs(time.time_ns() - newest) > _TICK_NS:
        with contextlib.suppress(OSError):  # a home that cannot be written to costs the time again, no more
            write_text(place, line(found))
    return found


def _slice(tensors: list[np.ndarray | Lazy], dtype: jnp.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """A copy that begins at a multiple of 64 bytes, which JAX on CPU takes without a further one.

    Args:
      tensors: one, or the experts of a layer.
      dtype: of the copy.
      index: of a tensor, of a layer's [1, ...], or of its experts' [1, X, ...] where each has a tensor.
    """
    inner = tensors[0].ndim
    outer, within = index[:-inner], index[-inner:]
    chosen = tensors[outer[1]] if len(outer) > 1 else tensors
    each = tuple(len(range(*part.indices(size))) for part, size in zip(within, tensors[0].shape, strict=True))
    shape = (*(1, len(chosen))[: len(outer)], *each)
    buffer = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    aligned = np.ndarray(shape, dtype, buffer, -buffer.ctypes.data % 64)
    for place, tensor in zip(aligned.reshape(len(chosen), *each), chosen, strict=True):
        if isinstance(tensor, Lazy):
            tensor.read(place, within)
        else:
            place[...] = tensor[within]
    return aligned


def fingerprint(tensors: dict[str, np.ndarray]) -> str:
    """Works out for tensors in memory what `Checkpoint.fingerprint` gives for files."""

    def line(name: str) -> bytes:
        tensor = tensors[name]
        digest = hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data).hexdigest()
        return f"{name} {tensor.dtype} {tensor.shape} {digest}\n".encode()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b"".join(pool.map(line, sorted(tensors)))).hexdigest()


def _shards(directory: Path) -> list[Path]:
    """One file, or those that the index names; where both stand, transformers reads the one file."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    remedy = "download it again"
    named = read_object(index, remedy).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index}: its weight_map must name a file for each tensor; {remedy}")
    for name in named.values():
        if not re.fullmatch(r"[\w.+-]{1,200}\.safetensors", name, re.ASCII):
            raise UserError(f"{index}: names {name[:80]!r}, which is no safetensors file beside it; {remedy}")
    return [directory / name for name in sorted(set(named.values()))]


class Part(NamedTuple):
    """The place of a parameter in the files: rows of a tensor, all of them unless it holds several parameters."""

    template: str  # `{}` is the layer, a second one the expert
    stack: tuple[int, ...]  # how many tensors make up the parameter: layers, and experts; empty where it is one
    layers: list[int]  # that have it
    start: int  # its first row, of the tensor as [out, in]; of each group where they are several
    groups: int  # into which the tensor's rows fall; each holds a like part of every parameter
    transposed: bool  # the tensor is [in, out]
    experts: bool  # the tensor holds those of a layer, [X, ...], each as the fields above say

    def split(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of a layer's parameter -> its axis of experts, if it has one, and the others."""
        return shape[: int(self.experts)], shape[int(self.experts) :]

    def rows(self, tensor: np.ndarray | Lazy, shape: tuple[int, ...]) -> np.ndarray | Lazy:
        """The parameter's own rows of a tensor; `shape` is the parameter's."""
        _, (count, *width) = self.split(shape)
        if not self.experts and not self.transposed and self.groups == 1:
            return tensor[self.start : self.start + count]

        def own(tensor: np.ndarray) -> np.ndarray:
            """[n, ...] of n experts."""
            tensor = tensor.swapaxes(1, -1) if self.transposed else tensor
            grouped = tensor.reshape(len(tensor), self.groups, -1, *width)
            return grouped[:, :, self.start : self.start + count // self.groups].reshape(len(tensor), count, *width)

        if self.experts:
            return tensor.each(own, count, *width) if isinstance(tensor, Lazy) else own(tensor)
        return own(np.asarray(tensor)[None])[0]

    def join(self, parameters: list[np.ndarray]) -> np.ndarray:
        """The tensor that holds these parameters, of which this is the first: the way back from `rows`."""
        whole, axis = parameters[0], int(self.experts)
        if len(parameters) > 1:
            experts, (_, *width) = self.split(whole.shape)
            grouped = [array.reshape(*experts, self.groups, -1, *width) for array in parameters]
            whole = np.concatenate(grouped, axis=axis + 1).reshape(*experts, -1, *width)
        return np.ascontiguousarray(whole.swapaxes(axis, -1) if self.transposed else whole)

    def names(self) -> dict[tuple[int, ...], str]:
        """Place in the stack -> tensor, in order."""
        return {
            index: self.template.format(*(self.layers[layer] for layer in index[:1]), *index[1:])
            for index in np.ndindex(self.stack)
        }


def each_expert(tensors: Mapping[str, np.ndarray | Lazy]) -> Mapping[str, np.ndarray | Lazy]:
    """Names each expert by itself, as transformers saves them, where Qwen3.5 is published with those of a layer in one
    tensor: gate above up, [X, 2 F, D], and down. gpt-oss's, which have biases, are another matter.
    """
    found: dict[str, np.ndarray | Lazy] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        together = layer.endswith(".mlp.experts") and kind in ("gate_up_proj", "down_proj")
        if not together or isinstance(tensor, Lazy) or tensor.ndim != 3 or f"{layer}.{kind}_bias" in tensors:
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if kind == "down_proj":
                found[f"{layer}.{number}.down_proj.weight"] = expert
            else:
                gate, up = np.split(expert, 2)
                found |= {f"{layer}.{number}.gate_proj.weight": gate, f"{layer}.{number}.up_proj.weight": up}
    return found if len(found) > len(tensors) else tensors


class Spelling(NamedTuple):
    """How a checkpoint spells the names of `tensor_names`: what stands in place of their root, and before the head."""

    root: str
    model: str
    head: str

    def __call__(self, name: str) -> str:
        return self.model + name.removeprefix(self.root) if name.startswith(self.root) else self.head + name

    def plain(self, name: str) -> str | None:
        """The way back from a checkpoint's name; None where it is not the language model's."""
        if name.startswith(self.model):
            return self.root + name.removeprefix(self.model)
        others = name.removeprefix(self.root).startswith(OTHER_MODELS)
        return None if others or not name.startswith(self.head) else name.removeprefix(self.head)


# What begins the names of layers that predict later tokens, where they have their own.
LATER = "mtp."
# What begins the names of a wrapper's other models.
OTHER_MODELS = ("vision_tower.", "multi_modal_projector.", "visual.")


def spelling(config: DecoderConfig, present: Collection[str]) -> Spelling:
    """Chooses the spelling by `present`, a checkpoint's names; without any, it is a language model's of its own.

    A model without its head lacks the root. A language model inside a wrapper has its name before or behind that.
    """
    embedding = tensor_names(config)["embedding"]
    root = embedding[: embedding.index(".") + 1]
    plain, wrapped = Spelling(root, root, ""), Spelling(root, f"language_model.{root}", "language_model.")
    known = [plain, Spelling(root, "", ""), wrapped, Spelling(root, f"{root}language_model.", "")]
    return next((spelled for spelled in known if spelled(embedding) in present), plain)


def parts(config: DecoderConfig, shapes: dict[str, tuple[int, ...]], spelled: Spelling) -> dict[str, Part]:
    """Parameter path -> its part, given the stacked shapes and how names are spelled."""
    found: dict[str, Part] = {}
    rows: dict[str, int] = {}
    for path, name in tensor_names(config).items():
        template = spelled(name)
        axes = template.count("{}")
        stack, shape, start = shapes[path][:axes], shapes[path][axes:], rows.get(template, 0)
        name = path.split("/")[-1]
        experts = config.experts_together and name.startswith("expert_")
        shape = shape[int(experts) :]
        transposed = (experts or config.transposed) and axes > 0 and len(shape) == 2
        in_turns = experts and not name.startswith("expert_down")
        groups = shape[0] if in_turns else 1
        if name.removesuffix("_bias") in config.fused_by_head:
            groups = config.linear_key_heads if name.startswith("linear_") else config.num_heads
        found[path] = Part(template, stack, layers_with(config, name), start, groups, transposed, experts)
        rows[template] = start + shape[0] // groups
    return found
