"""A Hugging Face directory as a Flax checkpoint, and back: the same tensors, byte for byte.

What is worked out of a GGUF file or of quantised tensors becomes a plain Hugging Face directory.
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e2p_jax.backbone import flax_checkpoint
from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import read_config
from e2p_jax.backbone.flax_checkpoint import FlaxCheckpoint
from e2p_jax.backbone.lazy import Lazy
from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.backbone.weights import (
    abstract,
    copy_companions,
    in_dtype,
    load,
    named_tensors,
    open_checkpoint,
    parameters,
    restate_config,
)
from e2p_jax.config import MeshConfig
from e2p_jax.errors import UserError
from e2p_jax.files import replace_directory
from e2p_jax.parallel.mesh import make_mesh, param_sharding
from e2p_jax.tensors import write_tensors


def convert(
    directory: Path,
    out: Path,
    path: str,
    revision: str | None,
    dtype: str = "bfloat16",
    ignored_keys: Collection[str] = (),
) -> None:
    """Writes the other form of the model in `directory`.

    Args:
      dtype: of tensors that are worked out.
      path: what the directory was found by; a Flax checkpoint keeps it as the name that others know the model by.
      revision: of a hub id.
      ignored_keys: of config.json, as `backbone.ignored_keys`; a Flax checkpoint remembers its own.

    Raises:
      UserError: unreadable or mismatched files, or a Flax checkpoint whose parameters were changed.
    """
    checkpoint = open_checkpoint(directory)
    if isinstance(checkpoint, FlaxCheckpoint):
        _to_hugging_face(checkpoint, out)
    elif checkpoint.worked_out:
        _to_plain(checkpoint, out, jnp.dtype(dtype), ignored_keys)
    else:
        _to_flax(checkpoint, out, path, revision, ignored_keys)


def _to_flax(checkpoint: Checkpoint, out: Path, path: str, revision: str | None, ignored_keys: Collection[str]) -> None:
    decoder = _load(checkpoint.directory, ignored_keys)
    checkpoint.check(decoder.config, {name: value.shape for name, value in parameters(decoder).items()})
    held = {name for part in checkpoint.parts.values() for name in part.names().values()}
    others = {name: tensor for name, tensor in checkpoint.stored.items() if name not in held}
    manifest = {
        "fingerprint": checkpoint.fingerprint(),
        "path": path,
        "revision": revision,
        "ignored_keys": [*ignored_keys],
        "tensors": {name: tensor.dtype.name for name, tensor in sorted(checkpoint.tensors.items())},
    }
    with replace_directory(out) as temporary:
        copy_companions(checkpoint.directory, temporary)
        flax_checkpoint.write(temporary, nnx.to_pure_dict(nnx.state(decoder)), others, manifest)


def _to_hugging_face(checkpoint: FlaxCheckpoint, out: Path) -> None:
    with replace_directory(out) as temporary:
        copy_companions(checkpoint.directory, temporary)
        write_tensors(temporary, hugging_face_tensors(checkpoint.directory))
        if Checkpoint(temporary).fingerprint() != checkpoint.fingerprint():
            raise UserError(
                f"{checkpoint.directory}: its parameters are not those that `e2p convert` wrote there; convert the "
                "model again"
            )


def _to_plain(checkpoint: Checkpoint, out: Path, dtype: jnp.dtype, ignored_keys: Collection[str]) -> None:
    """All of floating point in `dtype`, which config.json names; nothing there says any more how it was quantised."""
    decoder = abstract(read_config(checkpoint.directory, ignored_keys), dtype=dtype)
    checkpoint.check(decoder.config, {name: value.shape for name, value in parameters(decoder).items()})
    with replace_directory(out) as temporary:
        copy_companions(checkpoint.directory, temporary)
        restate_config(temporary, dtype)
        write_tensors(temporary, ((name, in_dtype(name, tensor, dtype)) for name, tensor in checkpoint.tensors.items()))


def hugging_face_tensors(directory: Path, dtype: jnp.dtype | None = None) -> Iterable[tuple[str, np.ndarray]]:
    """The tensors of a model in any form, under their Hugging Face names and in their own dtypes.

    Args:
      dtype: of those that are worked out; float32 unless given.
    """
    checkpoint = open_checkpoint(directory)
    if isinstance(checkpoint, FlaxCheckpoint):
        return _unstacked(checkpoint)
    return ((name, t.astype(dtype or t.dtype) if isinstance(t, Lazy) else t) for name, t in checkpoint.tensors.items())


def _unstacked(checkpoint: FlaxCheckpoint) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in named_tensors(_load(checkpoint.directory, checkpoint.ignored_keys), checkpoint.names()):
        yield name, tensor.astype(jnp.dtype(checkpoint.dtypes[name]))
    yield from checkpoint.others().items()


def _load(directory: Path, ignored_keys: Collection[str]) -> Decoder:
    """In the dtypes of the files, over all devices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=jax.device_count()))
    place = functools.partial(param_sharding, mesh)
    return load(directory, dtype=None, sharding=place, ignored_keys=ignored_keys)
