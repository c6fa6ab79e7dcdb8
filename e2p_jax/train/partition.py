"""Freezing: one boolean tree decides what trains.

`trainable_mask` turns path patterns into the optax mask. It alone splits the parameters (`split`) and wraps the
optimizer (`optax.masked`). Masked-out leaves are `optax.MaskedNode`, an empty node: the gradient, the
optimizer state, the step's outputs and the checkpoints hold nothing in their place.
"""

import re
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from e2p_jax.errors import UserError
from e2p_jax.prefix.projector import Statistic

PyTree = Any


def path_name(path: tuple) -> str:
    """A key path as `backbone/layers/q`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _matches(pattern: str, path: str) -> bool:
    regex = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.fullmatch(regex, path) is not None


def trainable_mask(model: nnx.Module, patterns: tuple[str, ...]) -> PyTree:
    """Pure dict of booleans shaped like the model's state: True where a pattern matches a parameter.

    `Statistic`s never train.

    Raises:
      UserError: a pattern matches no parameter, or a parameter matches two patterns.
    """
    flat = nnx.to_flat_state(nnx.state(model))
    used = set()
    mask: dict[tuple, bool] = {}
    for path, variable in flat:
        name = "/".join(map(str, path))
        constant = isinstance(variable, Statistic)
        matching = [pattern for pattern in patterns if _matches(pattern, name) and not constant]
        if len(matching) > 1:
            raise UserError(f"train.trainable: parameter {name} matches both {matching[0]!r} and {matching[1]!r}")
        used.update(matching)
        mask[path] = bool(matching)
    for pattern in patterns:
        if pattern not in used:
            tops = sorted({"/".join(map(str, path[:2])) for path, _ in flat})
            raise UserError(f"train.trainable: pattern {pattern!r} matches no parameter; there are {', '.join(tops)}")
    return nnx.to_pure_dict(nnx.from_flat_state(list(mask.items())))


def refuse_trained_backbone(mask: PyTree) -> None:
    """For exports that name the frozen backbone, or copy its files.

    Raises:
      UserError: the run changed the backbone, or put adapters beside its matrices.
    """
    if any(jax.tree.leaves(mask["backbone"])) or mask.keys() - {"backbone", "projector", "items"}:
        raise UserError("this run trained the backbone itself; write it with --format backbone")


def split(params: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """(trainable, frozen), each shaped like `params` with `optax.MaskedNode` where the other has a leaf."""
    hole = optax.MaskedNode()
    trainable = jax.tree.map(lambda keep, p: p if keep else hole, mask, params)
    frozen = jax.tree.map(lambda keep, p: hole if keep else p, mask, params)
    return trainable, frozen


def join(trainable: PyTree, frozen: PyTree, mask: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(lambda keep, t, f: t if keep else f, mask, trainable, frozen)


def describe(params: PyTree, mask: PyTree) -> str:
    """One line: counts and bytes of the trainable and the frozen part."""

    def size(tree: PyTree) -> str:
        leaves = jax.tree.leaves(tree)
        count = sum(int(np.prod(leaf.shape)) for leaf in leaves)
        nbytes = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        return f"{count:,} parameters ({nbytes / 2**20:,.1f} MiB)"

    trainable, frozen = split(params, mask)
    return f"trainable {size(trainable)}, frozen {size(frozen)}"
