"""A backbone as a Flax checkpoint: Orbax, beside what a Hugging Face directory holds but its safetensors.

`params/` is the pure dict of a `Decoder`'s parameters, layers stacked, in the dtypes of the source. `flax.json` keeps
what is needed to give the source back: the dtype of each of its tensors, its fingerprint, and its name.
`others.safetensors` holds tensors of the source that are no parameters (a tied head saved twice, buffers), if any.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.errors import UserError
from e2p_jax.files import write_text
from e2p_jax.json_files import is_digest, read_object
from e2p_jax.tensors import DTYPES, read_tensors

PyTree = Any

MANIFEST, PARAMS, OTHERS = "flax.json", "params", "others.safetensors"
_DTYPES = {dtype.name for dtype in DTYPES.values()}
CHUNK_BYTES = 1 << 26  # written, and read: a device's part of a parameter is a few of them


class FlaxCheckpoint:
    """Opened; it offers what `Checkpoint` does."""

    def __init__(self, directory: Path):
        """
        Raises:
          UserError: a malformed manifest, or no parameters beside it.
        """
        self.directory = directory
        path, remedy = directory / MANIFEST, "run `e2p convert` again"
        self.manifest = read_object(path, remedy)
        given: dict[str, Any] = {key: self.manifest.get(key) for key in ("fingerprint", "tensors", "path", "revision")}
        self.ignored_keys = self.manifest.get("ignored_keys", [])
        if (
            not is_digest(given["fingerprint"])
            or not isinstance(given["path"], str)
            or not isinstance(given["revision"], str | None)
            or not isinstance(given["tensors"], dict)
            or not all(isinstance(name, str) and name in _DTYPES for name in given["tensors"].values())
            or not isinstance(self.ignored_keys, list)
            or not all(isinstance(key, str) for key in self.ignored_keys)
        ):
            raise UserError(f"{path}: malformed (its fingerprint, path, revision, tensors or ignored_keys); {remedy}")
        self._fingerprint, self.dtypes = given["fingerprint"], given["tensors"]
        self.name = given["path"], given["revision"]
        self._checkpointer = ocp.PyTreeCheckpointer()
        try:
            tree = self._checkpointer.metadata(self._params).item_metadata.tree
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{self._params}: not an Orbax checkpoint ({error}); run `e2p convert` again") from error
        self._metadata = {"/".join(path): leaf for path, leaf in _flatten(tree).items()}

    @property
    def _params(self) -> Path:
        return (self.directory / PARAMS).absolute()

    def names(self) -> set[str]:
        """Of the source's tensors."""
        return set(self.dtypes)

    @property
    def largest(self) -> int:
        """Bytes of the largest parameter."""
        return max(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in self._metadata.values())

    def check(self, config: DecoderConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        """Holds the stored parameters against the decoder's.

        Raises:
          UserError: listing all missing, unexpected and misshapen ones together.
        """
        there = {path: tuple(leaf.shape) for path, leaf in self._metadata.items()}
        problems = [f"missing {path}" for path in sorted(shapes.keys() - there.keys())]
        problems += [f"unexpected {path}" for path in sorted(there.keys() - shapes.keys())]
        for path in sorted(there.keys() & shapes.keys()):
            if there[path] != tuple(shapes[path]):
                problems.append(f"{path} has shape {there[path]}, config.json says {tuple(shapes[path])}")
        if problems:
            raise UserError(f"{self._params}: parameters and config.json disagree: {'; '.join(problems)}")

    def dtype(self, path: str) -> jnp.dtype:
        return jnp.dtype(self._metadata[path].dtype)

    def pieces(self, path: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Iterator[jax.Array]:
        """A parameter as one piece, restored onto `sharding` whatever mesh it was saved from."""
        wanted: PyTree = jax.ShapeDtypeStruct(shape, self.dtype(path), sharding=sharding)
        for key in reversed(path.split("/")):
            wanted = {key: wanted}
        restored = self._checkpointer.restore(
            self._params,
            ocp.args.PyTreeRestore(
                wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
            ),
        )
        (array,) = jax.tree.leaves(restored)
        yield array

    def others(self) -> dict[str, np.ndarray]:
        """Tensors of the source that are no parameters."""
        path = self.directory / OTHERS
        return read_tensors(path, "run `e2p convert` again") if path.is_file() else {}

    def fingerprint(self) -> str:
        """That of the source, as `e2p convert` computed it."""
        return self._fingerprint


def write(directory: Path, params: PyTree, others: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    """Adds parameters, further tensors and the manifest to a directory with a model's other files."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,)), params)
        checkpointer.save((directory / PARAMS).absolute(), ocp.args.PyTreeSave(params, save_args))
    if others:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in others.items()}, directory / OTHERS)
        (directory / OTHERS).chmod(0o644)  # the library writes it readable by its owner only
    write_text(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _flatten(tree: PyTree) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {(): tree}
    return {(key, *path): leaf for key, inner in tree.items() for path, leaf in _flatten(inner).items()}
