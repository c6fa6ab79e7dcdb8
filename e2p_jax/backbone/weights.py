"""Hugging Face directories in and out: safetensors -> sharded arrays, slice by slice, and back."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import read_config
from e2p_jax.backbone.layout import PLAIN, DecoderConfig, Execution, tensor_names
from e2p_jax.config import config_directory
from e2p_jax.errors import UserError
from e2p_jax.files import replace_directory

EMBEDDED = Path(__file__).parent.parent / "embedded" / "backbone"

# What a model directory holds beside its weights and is copied along with them.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def resolve(path: str, revision: str | None) -> Path:
    """`embedded`, a directory, or a hub id -> a local directory.

    Raises:
      UserError: not a directory, and the hub does not have it or cannot be reached.
    """
    if path == "embedded":
        return EMBEDDED
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) is None:
        raise UserError(f"backbone.path {path!r}: no such directory, and not a hub id like org/model")
    import huggingface_hub

    wanted = ["*.safetensors", "*.safetensors.index.json", *COMPANIONS]
    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"backbone.path {path!r}: not a directory here, and the hub gave no model "
            f"({type(error).__name__}). Download {', '.join(wanted[:2])}, config.json and the tokenizer files "
            "on a machine with network into a directory, and name that directory"
        ) from error


def find_config(path: str, revision: str | None) -> Path:
    """The directory with a backbone's config.json, where that alone is asked for.

    Published shapes that `configs/backbones` holds under their hub id are found without the hub.

    Raises:
      UserError: as `resolve` does.
    """
    shipped = config_directory() / "backbones" / path
    return shipped if (shipped / "config.json").is_file() else resolve(path, revision)


class Checkpoint:
    """The tensors of a model directory: one `model.safetensors`, or shards named by an index."""

    def __init__(self, directory: Path):
        """Opens every shard and checks its length.

        Raises:
          UserError: no safetensors, a shard missing, truncated or malformed, or a tensor in two shards.
        """
        self.directory = directory
        self.shards = _shards(directory)
        self._where: dict[str, Any] = {}  # tensor name -> its open file
        for shard in self.shards:
            if not shard.is_file():
                raise UserError(f"{shard}: not found; a backbone needs its weights as safetensors")
            try:
                file = safe_open(shard, framework="np")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{shard}: truncated or malformed safetensors ({error}); download it again") from error
            for name in file.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
                if name in self._where:
                    raise UserError(f"{shard}: tensor {name!r} also stands in another shard")
                self._where[name] = file
        if not self._where:
            raise UserError(f"{directory}: the safetensors hold no tensors")

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice of a tensor; only its bytes are read."""
        return self._where[name].get_slice(name)[index]

    def tensors(self, shard: int, prefix: str) -> dict[str, np.ndarray]:
        """One shard's tensors, their names behind `prefix`."""
        with safe_open(self.shards[shard], framework="np") as file:
            return {prefix + name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape and values."""
        return np.array_equal(*(self._where[name].get_tensor(name) for name in (first, second)))

    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and bytes, in name order; independent of sharding."""
        digest = hashlib.sha256()
        for name in sorted(self._where):
            tensor = np.ascontiguousarray(self._where[name].get_tensor(name))
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(tensor.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def _shards(directory: Path) -> list[Path]:
    """One file, or those that the index names; where both stand, transformers reads the one file."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: malformed index ({error}); download it again") from error


def choose_dtype(name: str, platform: str) -> jnp.dtype:
    """`auto` is float32 on the platform `cpu` and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


class _Part(NamedTuple):
    """Where a parameter stands in the files: rows of a tensor, all of them unless it holds several parameters."""

    template: str  # `{}` is the layer
    start: int  # its first row, of the tensor as [out, in]
    transposed: bool  # the tensor is [in, out]


def _parts(config: DecoderConfig, names: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> dict[str, _Part]:
    """Parameter path -> its part, given the names and the stacked shapes."""
    parts, rows = {}, dict.fromkeys(names.values(), 0)
    for path, template in names.items():
        stacked = "{}" in template
        shape = shapes[path][stacked:]
        parts[path] = _Part(template, rows[template], config.transposed and stacked and len(shape) == 2)
        rows[template] += shape[0]
    return parts


def left_out(config: DecoderConfig, present: set[str]) -> str:
    """What `present`, a checkpoint's names, lack in front: files of a model without its head have no `transformer.`."""
    prefix, _, bare = tensor_names(config)["embedding"].partition(".")
    return f"{prefix}." if bare in present else ""


def check_names(config: DecoderConfig, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> dict[str, _Part]:
    """Holds the checkpoint's tensors against the decoder's parameters.

    Args:
      config: read from `config.json`.
      checkpoint: the tensors beside it.
      shapes: parameter path -> stacked shape.

    Returns:
      Parameter path -> where it is.

    Raises:
      UserError: listing all missing, extra and misshapen tensors together.
    """
    present = checkpoint.names()
    prefix = left_out(config, present)
    names = {path: name.removeprefix(prefix) for path, name in tensor_names(config).items()}
    parts = _parts(config, names, shapes)
    wanted: dict[str, tuple[int, ...]] = {}
    for path, part in parts.items():  # of the parameters in one tensor, the last one ends it
        stacked = "{}" in part.template
        shape = shapes[path][stacked:]
        shape = (part.start + shape[0], *shape[1:])
        shape = shape[::-1] if part.transposed else shape
        wanted |= {part.template.format(i): shape for i in range(config.num_layers if stacked else 1)}
    # A tied head may be saved as well; rotary tables and GPT-2's causal masks are buffers of old exports.
    ignored = {"lm_head.weight"} if config.tie_head else set()
    buffers = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
    extra = {name for name in present - wanted.keys() - ignored if not name.endswith(buffers)}
    problems = [f"missing {name}" for name in sorted(wanted.keys() - present)]
    problems += [f"unexpected {name}" for name in sorted(extra)]
    for name in sorted(wanted.keys() & present):
        if checkpoint.shape(name) != tuple(wanted[name]):
            problems.append(f"{name} has shape {checkpoint.shape(name)}, config.json says {tuple(wanted[name])}")
    if not problems and ignored & present and not checkpoint.equal("lm_head.weight", names["embedding"]):
        problems.append(f"lm_head.weight is not {names['embedding']}, which tie_word_embeddings says it is")
    if problems:
        raise UserError(f"{checkpoint.directory}: weights and config.json disagree: {'; '.join(problems)}")
    return parts


def load(
    directory: Path,
    *,
    dtype: jnp.dtype,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
) -> Decoder:
    """Reads a backbone straight onto its devices; each host reads only the slices that its devices hold.

    Args:
      directory: of a Hugging Face model.
      dtype: of the loaded parameters.
      sharding: parameter path under `backbone/` and stacked shape -> sharding.

    Raises:
      UserError: unreadable or mismatched files.
    """
    config = read_config(directory)
    decoder = abstract(config, dtype=dtype)
    checkpoint = Checkpoint(directory)
    graph, state = nnx.split(decoder)
    flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    parts = check_names(config, checkpoint, {path: variable.get_value().shape for path, variable in flat.items()})
    for path, variable in flat.items():
        shape = variable.get_value().shape
        read = _reader(checkpoint, parts[path], shape, dtype)
        variable.set_value(jax.make_array_from_callback(shape, sharding(f"backbone/{path}", shape), read))
    return nnx.merge(graph, state)


def _reader(
    checkpoint: Checkpoint, part: _Part, shape: tuple[int, ...], dtype: jnp.dtype
) -> Callable[[Any], np.ndarray]:
    def read_one(name: str, index: tuple[slice, ...], rows: int) -> np.ndarray:
        first, last, _ = index[0].indices(rows)
        index = (slice(part.start + first, part.start + last), *index[1:])
        return checkpoint.read(name, index[::-1]).T if part.transposed else checkpoint.read(name, index)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if "{}" not in part.template:
            return read_one(part.template, index, shape[0]).astype(dtype)
        layers = range(*index[0].indices(shape[0]))
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
        stacked = np.empty(sizes, dtype)
        for row, layer in enumerate(layers):
            stacked[row] = read_one(part.template.format(layer), index[1:], shape[1])
        return stacked

    return read


def abstract(config: DecoderConfig, *, dtype: jnp.dtype, execution: Execution = PLAIN) -> Decoder:
    """The decoder with shapes in place of weights."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, execution=execution, rngs=nnx.Rngs(0)))


def save(decoder: Decoder, source: Path, out: Path, dtype: jnp.dtype) -> None:
    """Writes `decoder` as a Hugging Face directory; config and tokenizer files are copied from `source`."""
    flat = {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(decoder))}
    names = tensor_names(decoder.config)
    tensors: dict[str, np.ndarray] = {}
    for path, part in _parts(decoder.config, names, {path: value.shape for path, value in flat.items()}).items():
        value = np.asarray(jax.device_get(flat[path])).astype(dtype)
        for i, rows in enumerate(value if "{}" in part.template else value[None]):
            name, rows = part.template.format(i), rows.T if part.transposed else rows
            axis = -1 if part.transposed else 0
            tensors[name] = np.concatenate([tensors[name], rows], axis) if part.start else np.ascontiguousarray(rows)
    with replace_directory(out) as temporary:
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        config = json.loads((temporary / "config.json").read_text())
        config.pop("torch_dtype", None)
        (temporary / "config.json").write_text(json.dumps(config | {"dtype": jnp.dtype(dtype).name}, indent=2) + "\n")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)  # the library writes it readable by its owner only
