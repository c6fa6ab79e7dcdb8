"""Backbones in and out: the files of a directory -> sharded, perhaps quantised arrays, piece by piece, and back."""

import collections
import functools
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from e2p_jax.backbone import flax_checkpoint
from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import CONFIG_REMEDY, language_config, read_config
from e2p_jax.backbone.flax_checkpoint import FlaxCheckpoint
from e2p_jax.backbone.gguf import checkpoint as gguf
from e2p_jax.backbone.layout import PLAIN, DecoderConfig, Execution, matrix_shapes
from e2p_jax.backbone.lazy import Lazy
from e2p_jax.backbone.names import EXACT
from e2p_jax.backbone.packed import unpack
from e2p_jax.backbone.quantize import Kind, Quantization, quantize
from e2p_jax.backbone.tensor_files import Checkpoint, Part, each_expert, parts, spelling
from e2p_jax.config import config_directory
from e2p_jax.errors import UserError
from e2p_jax.files import replace_directory
from e2p_jax.json_files import read_object
from e2p_jax.parallel.distributed import is_first
from e2p_jax.tensors import write_tensors

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


def resolve(path: str, revision: str | None, *, weights: bool = True) -> Path:
    """`embedded`, a directory, a GGUF file, or a hub id -> a local directory.

    For a file, what `gguf.checkpoint.unfold` makes of it; for an id, the snapshot in the hub's cache, where `weights`
    says whether it has any.

    Raises:
      UserError: not a directory, and the hub does not have it or cannot be reached; a file that cannot be read.
    """
    if path == "embedded":
        return EMBEDDED
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_file():
        return gguf.unfold(directory)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) is None:
        raise UserError(f"backbone.path {path!r}: no such directory, and not a hub id like org/model")
    import huggingface_hub

    tensors = ("model*.safetensors", "model.safetensors.index.json")
    wanted = [*tensors, *COMPANIONS] if weights else list(COMPANIONS)
    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises a dozen unrelated types
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"backbone.path {path!r}: not a directory here, not in {huggingface_hub.constants.HF_HUB_CACHE}, and not "
            f"to be had from the hub ({type(error).__name__}). Where there is a network, run `hf download {path}{at} "
            f"--local-dir DIR` (it needs {', '.join(tensors)}, config.json and the tokenizer files), copy DIR here "
            "and set backbone.path to it"
        ) from error


def find_config(path: str, revision: str | None) -> Path:
    """The directory with a backbone's config.json and tokenizer, where its weights are not asked for.

    Published shapes that `configs/backbones` holds under their hub id are found without the hub.

    Raises:
      UserError: as `resolve` does.
    """
    shipped = config_directory() / "backbones" / path
    return shipped if (shipped / "config.json").is_file() else resolve(path, revision, weights=False)


def choose_dtype(name: str, platform: str) -> jnp.dtype:
    """`auto` is float32 on the platform `cpu` and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def open_checkpoint(directory: Path) -> Checkpoint | FlaxCheckpoint:
    """The weights in a model directory, of any form.

    Raises:
      UserError: missing or unreadable files.
    """
    if (directory / gguf.WEIGHTS).exists():
        return gguf.GgufCheckpoint(directory)
    if _is_flax(directory):
        return FlaxCheckpoint(directory)
    checkpoint, config = Checkpoint(directory), directory / "config.json"
    settings = read_object(config, CONFIG_REMEDY).get("quantization_config") if config.is_file() else None
    if settings is not None:
        checkpoint.tensors = unpack(checkpoint.stored, settings, config)
    checkpoint.tensors = each_expert(checkpoint.tensors)
    return checkpoint


def published(directory: Path, path: str, revision: str | None) -> tuple[str, str | None]:
    """Path and revision that other programs load the weights in `directory` by, given ours.

    Of a Flax checkpoint, which they cannot read, it is the Hugging Face model that it was made from.
    """
    return FlaxCheckpoint(directory).name if _is_flax(directory) else (path, revision)


def form_of(directory: Path) -> str:
    """Whose files a model directory holds."""
    return "GGUF" if (directory / gguf.WEIGHTS).exists() else "Flax" if _is_flax(directory) else "Hugging Face"


def has_name(directory: Path, path: str) -> bool:
    """Whether other programs can load the weights in `directory` by the path that `published` names."""
    return path != "embedded" and not (directory / gguf.WEIGHTS).exists()


def _is_flax(directory: Path) -> bool:
    return (directory / flax_checkpoint.MANIFEST).is_file()


def load(
    directory: Path,
    *,
    dtype: jnp.dtype | None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
    quantization: Quantization = "none",
    wanted: Callable[[str], bool] = lambda path: True,
    ignored_keys: Collection[str] = (),
) -> Decoder:
    """Reads a backbone straight onto its devices; each host reads only the slices that its devices hold.

    Host memory holds one tensor of the files at a time (a matrix of all experts of a layer; of a Flax checkpoint, one
    parameter). A matrix to be quantised is so as soon as it is on its devices.

    Args:
      directory: of a Hugging Face model, or a Flax checkpoint.
      dtype: of the loaded parameters; None keeps those of the files.
      sharding: parameter path under `backbone/` and stacked shape -> sharding.
      quantization: of the layers' matrices.
      wanted: parameter path -> whether it is read; of the others the decoder holds the shapes.
      ignored_keys: of config.json, as `backbone.ignored_keys`.

    Raises:
      UserError: unreadable or mismatched files.
    """
    config = read_config(directory, ignored_keys)
    decoder = abstract(config, dtype=dtype or jnp.dtype("float32"))
    checkpoint = open_checkpoint(directory)
    flat = parameters(decoder)
    checkpoint.check(config, {path: leaf.shape for path, leaf in flat.items()})
    for path, leaf in flat.items():
        kind = None if quantization == "none" or path not in matrices(config) else quantization
        kept = leaf.dtype if dtype else checkpoint.dtype(path)
        shapes = jax.eval_shape(
            functools.partial(_stored, kind=kind, dtype=kept), jax.ShapeDtypeStruct(leaf.shape, kept)
        )
        if wanted(path):
            pieces = checkpoint.pieces(path, leaf.shape, sharding(f"backbone/{path}", leaf.shape))
            _store(decoder, path, _assemble(pieces, path, shapes, kind, kept, sharding, checkpoint.largest))
        else:
            _store(decoder, path, shapes)
    return decoder


def _assemble(
    pieces: Iterator[jax.Array],
    path: str,
    stored: dict[str, jax.ShapeDtypeStruct],
    kind: Kind | None,
    dtype: jnp.dtype,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
    room: int,
) -> dict[str, jax.Array]:
    """A parameter as it is kept, by suffix of its path, filled piece by piece along axis 0.

    The host holds two pieces, or one where two would take more than `room` bytes.
    """
    places = {suffix: sharding(f"backbone/{path}{suffix}", leaf.shape) for suffix, leaf in stored.items()}
    whole = {s: jnp.zeros(leaf.shape, leaf.dtype, device=places[s]) for s, leaf in stored.items()}
    write, start = _writer(kind, dtype, tuple(places.items())), 0
    for piece in pieces:
        jax.block_until_ready(whole)  # the piece was read while the one before was written
        whole = write(whole, piece, start)
        if 2 * piece.nbytes > room:
            jax.block_until_ready(whole)
        start += len(piece)
    return whole


def _stored(piece: jax.Array, kind: Kind | None, dtype: jnp.dtype) -> dict[str, jax.Array]:
    return quantize(piece, kind) if kind else {"": piece.astype(dtype)}


@functools.cache
def _writer(
    kind: Kind | None, dtype: jnp.dtype, places: tuple[tuple[str, jax.sharding.Sharding], ...]
) -> Callable[[dict[str, jax.Array], jax.Array, int], dict[str, jax.Array]]:
    """(whole, piece, start) -> whole with the piece in it, in place. Kept, so that jit knows it again."""

    def put(whole: jax.Array, rows: jax.Array, start: int) -> jax.Array:
        """As integers: XLA on CPU converts all of a bfloat16 array to float32 and back to update a part of it."""
        bits = jnp.dtype(f"uint{8 * rows.dtype.itemsize}")
        as_bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=bits)
        changed = jax.lax.dynamic_update_slice_in_dim(as_bits(whole), as_bits(rows), start, 0)
        return jax.lax.bitcast_convert_type(changed, rows.dtype)

    def write(whole: dict[str, jax.Array], piece: jax.Array, start: int) -> dict[str, jax.Array]:
        return {suffix: put(whole[suffix], rows, start) for suffix, rows in _stored(piece, kind, dtype).items()}

    return jax.jit(write, donate_argnums=0, out_shardings=dict(places))


def matrices(config: DecoderConfig) -> list[str]:
    """Paths of the parameters that quantisation changes; what is small and decisive is not among them."""
    decisive = ("router", "linear_write", "linear_decay")
    return [f"layers/{name}" for name in matrix_shapes(config) if not name.endswith(decisive)]


def parameters(decoder: Decoder) -> dict[str, Any]:
    """Path -> array, or what stands in its place."""
    return {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(decoder))}


def _store(decoder: Decoder, path: str, stored: dict[str, jax.Array]) -> None:
    """Puts arrays in the place of a parameter, under its name with their suffixes."""
    *outer, name = path.split("/")
    module = getattr(decoder, outer[0]) if outer else decoder
    delattr(module, name)
    for suffix, value in stored.items():
        setattr(module, name + suffix, nnx.Param(value))


def abstract(
    config: DecoderConfig, *, dtype: jnp.dtype, execution: Execution = PLAIN, quantization: Quantization = "none"
) -> Decoder:
    """The decoder with shapes in place of weights."""

    def build() -> Decoder:
        decoder = Decoder(config, dtype=dtype, execution=execution, rngs=nnx.Rngs(0))
        return decoder if quantization == "none" else quantize_layers(decoder, quantization)

    return nnx.eval_shape(build)


def quantize_layers(decoder: Decoder, kind: Kind) -> Decoder:
    """The decoder, its layers' matrices changed in place."""
    full = parameters(decoder)
    for path in matrices(decoder.config):
        _store(decoder, path, quantize(full[path], kind))
    return decoder


def named_tensors(decoder: Decoder, present: Collection[str] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """A decoder's parameters as Hugging Face tensors, gathered on the host one by one, in their own dtype.

    In a run of several processes all must go through them.

    Args:
      decoder: not quantised.
      present: names in the files that it came from, which tell whether the first part of each is left out there.
    """
    flat = parameters(decoder)
    shapes = {path: value.shape for path, value in flat.items()}
    held: dict[str, list[tuple[str, Part, tuple[int, ...]]]] = {}
    for path, part in parts(decoder.config, shapes, spelling(decoder.config, present)).items():
        for index, name in part.names().items():
            held.setdefault(name, []).append((path, part, index))
    for name, rows in held.items():
        read = [_gather(flat[path][index] if index else flat[path]) for path, _, index in rows]
        yield name, rows[0][1].join(read)


def _gather(value: jax.Array) -> np.ndarray:
    """The whole array, wherever its parts are."""
    return np.asarray(value if value.is_fully_addressable else multihost_utils.process_allgather(value, tiled=True))


def save(decoder: Decoder, source: Path, out: Path, dtype: jnp.dtype) -> None:
    """Writes `decoder` as a Hugging Face directory; config and tokenizer files are copied from `source`, less what
    is of the other models beside a wrapped one.

    In a run of several processes all must call it; process 0 writes.
    """
    tensors = ((name, in_dtype(name, tensor, dtype)) for name, tensor in named_tensors(decoder))
    if not is_first():
        collections.deque(tensors, maxlen=0)  # takes part in gathering them
        return
    with replace_directory(out) as temporary:
        copy_companions(source, temporary)
        config = language_config(json.loads((temporary / "config.json").read_text(encoding="utf-8")))
        (temporary / "config.json").write_text(json.dumps(config))
        restate_config(temporary, dtype)
        write_tensors(temporary, tensors)


def in_dtype(name: str, tensor: np.ndarray | Lazy, dtype: jnp.dtype) -> np.ndarray:
    """A tensor as a directory of a dtype holds it: some in float32, as they are published."""
    return tensor.astype(np.float32 if name.endswith(EXACT) else dtype)


def restate_config(directory: Path, dtype: jnp.dtype) -> None:
    """Says in `config.json` that the tensors are plain ones of a dtype."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", "quantization_config"):
        config.pop(key, None)
    (directory / "config.json").write_text(json.dumps(config | {"dtype": jnp.dtype(dtype).name}, indent=2) + "\n")


def copy_companions(source: Path, out: Path) -> None:
    """Copies what a model directory holds beside its weights."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
