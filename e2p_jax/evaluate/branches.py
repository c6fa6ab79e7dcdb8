"""The likelihood of many ends of one conversation, whose common beginning is read once.

A row holds the beginning, the trunk, in a key-value cache; behind it stand the ends, the branches, each a segment that
sees the trunk and itself. Positions of every branch go on from the trunk's, and so do windows and the states of linear
attention: a branch is told the same as when it stands alone.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e2p_jax.backbone.decoder import Cache, branched
from e2p_jax.data.encode import Encoder, Example
from e2p_jax.evaluate.generate import padded_length
from e2p_jax.parallel.mesh import on_all, row_shards
from e2p_jax.train.metrics import Progress
from e2p_jax.train.run import Run
from e2p_jax.train.score import refuse_not_finite
from e2p_jax.vectors.source import Vectors

STEP = 64  # rows hold a multiple of so many tokens of branches
WIDEST = 1024  # at most, if no branch is longer
QUADRATIC = 2048  # in such rows attention, which is between all branches of a row, costs about as much as all else
SHORTEST = 16  # trunk


class Tree(NamedTuple):
    """Examples that begin alike, C of them."""

    examples: Sequence[Example]
    trunk: int  # tokens that all begin with, short of any target

    @classmethod
    def of(cls, examples: Sequence[Example], num_tokens: int) -> "Tree":
        """A candidate whose first token another text would change has it in its branch."""
        first = min(int(np.argmax(example.is_target)) for example in examples)
        marked = []
        for example in examples:
            tokens = example.tokens.copy()
            tokens[example.slot_places(num_tokens)] = -1
            marked.append(tokens[:first])
        apart = np.flatnonzero(np.any(np.stack(marked) != marked[0][None], axis=0))
        return cls(examples, int(apart[0]) if len(apart) else first)

    def branch_length(self, number: int) -> int:
        """Tokens behind the trunk that something is predicted from: all but the last."""
        return len(self.examples[number].tokens) - self.trunk - 1


class Part(NamedTuple):
    """The same positions of B rows, [B, T] int32 each."""

    tokens: np.ndarray
    slots: np.ndarray  # into the user's K soft tokens, -1 where there is none
    positions: np.ndarray
    segments: np.ndarray  # 0 is padding

    @classmethod
    def empty(cls, rows: int, length: int, pad: int) -> "Part":
        return cls(*(np.full((rows, length), value, np.int32) for value in (pad, -1, 0, 0)))

    def write(
        self, row: int, start: int, segment: int, example: Example, first: int, end: int, num_tokens: int
    ) -> None:
        """The tokens `first` to `end` of an example, from the place `start` on."""
        slots = np.full(len(example.tokens), -1, np.int32)
        slots[example.slot_places(num_tokens)] = np.arange(num_tokens)[None]
        values = example.tokens[first:end], slots[first:end], np.arange(first, end), segment
        for array, value in zip(self, values, strict=True):
            array[row, start : start + end - first] = value


class _Row(NamedTuple):
    """A tree's number, and those of its branches that stand in one row."""

    tree: int
    branches: list[int]


def _fill(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Branches in rows, each into the first that takes it, the longest first (Johnson, 1973)."""
    rows: list[list[int]] = []
    left: list[int] = []
    for branch in sorted(range(len(lengths)), key=lambda branch: -lengths[branch]):
        row = next((row for row, space in enumerate(left) if lengths[branch] <= space), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(width)
        rows[row].append(branch)
        left[row] -= lengths[branch]
    return rows


def _plan(trees: Sequence[Tree]) -> tuple[int, dict[int, list[_Row]]]:
    """How many tokens of branches stand in a row, the same for all, so that all rows together cost least; and the rows
    by how many tokens their trunk is padded to.
    """
    lengths = [[tree.branch_length(branch) for branch in range(len(tree.examples))] for tree in trees]
    sums, trunks = np.array([sum(each) for each in lengths]), np.array([tree.trunk for tree in trees])
    least = _multiple(max(map(max, lengths)))

    def cost(width: int) -> float:
        rows = np.maximum(-(-sums // width), 1)
        return float(np.sum(rows * (trunks + width)) * (1 + width / QUADRATIC))

    width = min(range(least, max(least, WIDEST) + 1, STEP), key=cost)
    rows: dict[int, list[_Row]] = {}
    for number, tree in enumerate(trees):
        padded = rows.setdefault(padded_length(tree.trunk, SHORTEST), [])
        padded += [_Row(number, branches) for branches in _fill(lengths[number], width)]
    return width, rows


def branch_nll(
    run: Run, groups: Sequence[Sequence[Example]], vectors: Vectors, label: str = "rank"
) -> list[np.ndarray]:
    """Scores examples in groups that begin alike.

    Args:
      groups: N of them, of one or more examples each, with targets in each.
      vectors: one per group.
      label: of the progress on stderr.

    Returns:
      N arrays [C] float64: nats summed over each example's targets.

    Raises:
      UserError: naming users for whom they are not finite.
    """
    encoder = run.inputs.encoder
    trees = [Tree.of(examples, encoder.num_tokens) for examples in groups]
    width, by_length = _plan(trees)
    targets = max(
        sum(int(trees[row.tree].examples[n].is_target.sum()) for n in row.branches)
        for rows in by_length.values()
        for row in rows
    )
    shape = width, _multiple(targets)
    out = [np.zeros(len(tree.examples)) for tree in trees]
    train = run.inputs.config.train
    progress, done = Progress(sum(map(len, by_length.values())), 0, label), 0
    with contextlib.closing(progress), jax.set_mesh(run.model.mesh):
        for length, rows in by_length.items():
            # As many tokens at once as in training, and no more rows than there are.
            most = max(train.rows * encoder.max_length // (length + width), 1)
            size = -(-len(rows) // -(-len(rows) // most))
            size = -(-size // row_shards()) * row_shards()
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                trunk, branches, asked_for, owners = _batch(trees, part, (size, length, *shape), encoder)
                asked = vectors.gather([row.tree for row in part] + [part[-1].tree] * (size - len(part)))[:, None]
                nll = np.asarray(_nll(run.model.params, asked, trunk, branches, *asked_for, graph=run.model.graph))
                for place, (number, _) in enumerate(part):
                    ours = owners[place] >= 0
                    nats = nll[place, ours].astype(np.float64)
                    out[number] += np.bincount(owners[place, ours], nats, len(out[number]))
                done += len(part)
                progress.update(done, "", show=True)
    refuse_not_finite(np.array([sums.sum() for sums in out]), [tree.examples[0].user_id for tree in trees])
    return out


def _batch(
    trees: Sequence[Tree], part: Sequence[_Row], shape: tuple[int, int, int, int], encoder: Encoder
) -> tuple[Part, Part, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Rows as `_nll` takes them, and [B, M] which branch each target is of, -1 for none."""
    size, length, width, targets = shape
    trunk, branch = (Part.empty(size, wide, encoder.pad_id) for wide in (length, width))
    places, ids, owners = (np.full((size, targets), value, np.int32) for value in (0, 0, -1))
    for row, (number, branches) in enumerate(part):
        tree = trees[number]
        trunk.write(row, length - tree.trunk, 1, tree.examples[0], 0, tree.trunk, encoder.num_tokens)
        place = target = 0
        for segment, n in enumerate(branches, 1):
            example = tree.examples[n]
            branch.write(row, place, segment, example, tree.trunk, len(example.tokens) - 1, encoder.num_tokens)
            found = np.flatnonzero(example.is_target)
            last, behind = target + len(found), found - tree.trunk
            places[row, target:last] = np.where(behind > 0, place + behind, 0)
            ids[row, target:last], owners[row, target:last] = example.tokens[found], n
            place, target = place + tree.branch_length(n), last
    return trunk, branch, (places, ids), owners


def _multiple(count: int) -> int:
    return -(-max(int(count), 1) // STEP) * STEP


@functools.partial(jax.jit, static_argnames="graph")
def _nll(
    params: Any,
    user_embeddings: jax.Array,  # [B, 1, E] float32
    trunk: Part,  # its text at the end
    branches: Part,
    target_places: jax.Array,  # [B, M] int32: of the position before the target; 0 is the trunk's last, then branches
    target_ids: jax.Array,  # [B, M] int32
    *,
    graph: nnx.GraphDef,
) -> jax.Array:
    """[B, M] float32 nats."""
    model = nnx.merge(graph, params)

    def read(part: Part, cache: Cache) -> tuple[jax.Array, Cache]:
        x = model.embed(part.tokens, part.slots, user_embeddings)
        return model.hidden(x, part.positions, part.segments, cache)

    rows = trunk.tokens.shape[0]
    before, cache = read(trunk, model.backbone.empty_cache(rows, trunk.tokens.shape[1] + branches.tokens.shape[1]))
    behind, _ = read(branches, branched(cache))
    hidden = jnp.concatenate([before[:, -1:], behind], axis=1)
    return on_all(model.nll(jnp.take_along_axis(hidden, target_places[..., None], axis=1), target_ids))
