"""Records -> batches on the devices.

Rows are planned once, so an epoch is a permutation of the rows and batch number `step` is a pure function of
(seed, step). Its position is one number: a resumed run, on any number of processes, sees the same batches.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from e2p_jax.data.columns import Ragged
from e2p_jax.data.encode import Encoder, Example
from e2p_jax.data.examples import Examples
from e2p_jax.data.packing import Budget, choose_budget, empty_rows, fill_row, plan_rows
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import row_sharding
from e2p_jax.prefix.model import Batch
from e2p_jax.vectors.source import Vectors

_BLOCK = 1 << 24  # bytes of vectors that are digested at once


@dataclasses.dataclass(frozen=True)
class PackedDataset:
    """Examples, where their users' vectors are, and the rows they were packed into."""

    examples: Examples
    vectors: Vectors  # one per example
    rows: Ragged  # of example numbers
    budget: Budget
    num_tokens: int  # K

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The batch made of these rows; a negative number is a row of padding."""
        batch = empty_rows(len(rows), self.budget, self.vectors.width)
        members = [self.rows[row].tolist() if row >= 0 else [] for row in rows]
        vectors = iter(self.vectors.gather([number for numbers in members for number in numbers]))
        for place, numbers in enumerate(members):
            examples = [self.examples.segment(number) for number in numbers]
            fill_row(batch, place, examples, list(itertools.islice(vectors, len(numbers))), self.num_tokens)
        return batch

    def digest(self) -> bytes:
        """Of every token, vector and row: what hosts must agree on before they train together."""
        digest = hashlib.sha256()
        size = max(_BLOCK // (4 * self.vectors.width), 1)
        for first in range(0, len(self.vectors), size):
            digest.update(self.vectors.gather(slice(first, first + size)).data)
        held = self.examples
        items = (held.items, held.item_ends) if len(held.items) else ()
        for array in (held.tokens, held.is_target, held.ends, self.rows.values, *items):
            digest.update(np.ascontiguousarray(array).data)
        return digest.digest()

    @property
    def efficiency(self) -> float:
        """Share of the rows' tokens that are not padding."""
        return len(self.examples.tokens) / (len(self.rows) * self.budget.tokens)


def pack(
    examples: Iterable[Example], vectors: Vectors, encoder: Encoder, budget: Budget | None = None
) -> PackedDataset:
    """Plans the rows; the budget is chosen where none is given."""
    examples = examples if isinstance(examples, Examples) else Examples.of(examples)
    budget = budget or choose_budget(examples, encoder.max_length)
    return PackedDataset(examples, vectors, plan_rows(examples, budget), budget, encoder.num_tokens)


@dataclasses.dataclass(frozen=True)
class _Steps(grain.sources.RandomAccessDataSource):
    """Batch of every step of a run, this process's rows only; Grain reads ahead through it."""

    dataset: PackedDataset
    batch_rows: int
    steps: int
    seed: int
    local: np.ndarray  # the rows of a batch that this process holds

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.dataset.batch(rows_at(self.dataset, self.seed, step * self.batch_rows + self.local))


def rows_at(dataset: PackedDataset, seed: int, places: np.ndarray) -> list[int]:
    """The rows that stand at these places of the whole run: batch after batch, epoch after epoch."""
    epochs, within = np.divmod(places, len(dataset.rows))
    return [int(epoch_order(seed, int(e), len(dataset.rows))[i]) for e, i in zip(epochs, within, strict=True)]


@functools.lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """[rows] int32: the rows of an epoch, shuffled."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(rows, dtype=np.int32))


def local_rows(mesh: Mesh, batch_rows: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold, ascending.

    Raises:
      UserError: the rows do not spread evenly over the devices.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_rows % shards:
        raise UserError(f"train.rows={batch_rows} does not divide by mesh.data x mesh.fsdp = {shards}; use a multiple")
    indices = row_sharding(mesh).addressable_devices_indices_map((batch_rows,)).values()
    return np.unique(np.concatenate([np.arange(batch_rows)[index] for index in indices]))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, batch_rows: int) -> Batch:
    """Sends this process's rows to their places of the global batch, and does not wait until they are there."""
    place = row_sharding(mesh)
    return {  # type: ignore[return-value]
        name: jax.make_array_from_process_local_data(place, array, (batch_rows, *array.shape[1:]))
        for name, array in batch.items()
    }


def batch_shapes(mesh: Mesh, batch_rows: int, budget: Budget, width: int) -> Batch:
    """Shapes, dtypes and shardings of what `to_devices` gives, of vectors of `width` numbers."""
    return {  # type: ignore[return-value]
        name: jax.ShapeDtypeStruct((batch_rows, *array.shape[1:]), array.dtype, sharding=row_sharding(mesh))
        for name, array in empty_rows(1, budget, width).items()
    }


def train_iterator(
    dataset: PackedDataset, mesh: Mesh, *, batch_rows: int, steps: int, seed: int
) -> grain.DatasetIterator:
    """Checkpointable iterator over this process's rows of every batch, built ahead in threads."""
    source = _Steps(dataset, batch_rows, steps, seed, local_rows(mesh, batch_rows))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def on_devices(iterator: grain.DatasetIterator, mesh: Mesh, batch_rows: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """The iterator's batches on the devices, each with the iterator's state behind it: a run that has consumed the
    batch goes on from there. The next is on its way by then, so that no step waits for its bytes.
    """
    sent: list[tuple[Batch, dict[str, Any]]] = []
    for batch in iterator:
        sent.append((to_devices(batch, mesh, batch_rows), iterator.get_state()))
        if len(sent) > 1:
            yield sent.pop(0)
    yield from sent


def eval_batches(dataset: PackedDataset, mesh: Mesh, batch_rows: int) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Every row once: the batch, and for each of its rows the example numbers of its segments."""
    local, nobody = local_rows(mesh, batch_rows), np.zeros(0, np.int64)
    for first in range(0, len(dataset.rows), batch_rows):
        numbers = [n if n < len(dataset.rows) else -1 for n in range(first, first + batch_rows)]
        batch = dataset.batch([numbers[i] for i in local])
        yield to_devices(batch, mesh, batch_rows), [dataset.rows[n] if n >= 0 else nobody for n in numbers]
