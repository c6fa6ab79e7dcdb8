"""Batches: a pure function of (seed, step), every row once an epoch, the same on every mesh."""

import dataclasses
import hashlib
from typing import Any

import grain
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from e2p_jax.config import MeshConfig
from e2p_jax.data import pipeline
from e2p_jax.data.columns import Ragged
from e2p_jax.data.encode import Example
from e2p_jax.data.examples import Examples
from e2p_jax.data.packing import Budget
from e2p_jax.data.pipeline import PackedDataset
from e2p_jax.datasets import synthetic
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import make_mesh
from e2p_jax.vectors.source import Vectors
from e2p_jax.vectors.table import UserTable

ROWS = 7
MESHES = [
    {"data": 4},
    {"data": 2, "fsdp": 2},
    {"data": 1, "fsdp": 4},
    {"data": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "tensor": 2},
    {"data": 1, "tensor": 4},
]


@pytest.fixture(scope="module")
def dataset() -> PackedDataset:
    """Seven rows of two examples; row r holds the tokens 10r + 1 and 10r + 2 and vectors of the same numbers."""

    def example(number: int) -> Example:
        tokens = np.array([0, number, number], np.int32)
        return Example(tokens, np.array([False, True, True]), (0,), f"user-{number}")

    numbers = [10 * row + side for row in range(ROWS) for side in (1, 2)]
    vectors = np.array(numbers, np.float32)[:, None] * np.ones((1, 3), np.float32)
    rows = Ragged.of([[2 * row, 2 * row + 1] for row in range(ROWS)])
    return PackedDataset(Examples.of(map(example, numbers)), Vectors.of(vectors), rows, Budget(8, 6, 2), 1)


def row_numbers(batch: dict[str, np.ndarray]) -> list[int]:
    return [int(number) // 10 for number in np.asarray(batch["tokens"])[:, 1]]


def iterator(dataset: PackedDataset, *, batch_rows: int = 4, steps: int = 20, seed: int = 0) -> grain.DatasetIterator:
    return pipeline.train_iterator(dataset, make_mesh(MeshConfig()), batch_rows=batch_rows, steps=steps, seed=seed)


def test_every_row_once_an_epoch(dataset: PackedDataset) -> None:
    seen = [number for batch in iterator(dataset, steps=14) for number in row_numbers(batch)]
    assert len(seen) == 8 * ROWS
    epochs = [tuple(seen[start : start + ROWS]) for start in range(0, len(seen), ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len(set(epochs)) > 1  # each epoch in an order of its own


def test_batches_are_a_function_of_seed_and_step(dataset: PackedDataset) -> None:
    first, again, other, longer = (
        [batch["tokens"].tolist() for batch in iterator(dataset, seed=seed, steps=steps)]
        for seed, steps in ((3, 20), (3, 20), (4, 20), (3, 30))
    )
    assert first == again == longer[:20]
    assert first != other


def test_an_epochs_order_takes_four_bytes_a_row() -> None:
    """Two are held at most, and the order is the one that runs were begun with."""
    orders = [pipeline.epoch_order(5, epoch, 1000) for epoch in range(3)]
    assert {order.nbytes for order in orders} == {4000} and pipeline.epoch_order.cache_info().currsize <= 2
    for epoch, order in enumerate(orders):
        np.testing.assert_array_equal(order, np.random.default_rng([5, epoch]).permutation(1000))


@pytest.mark.parametrize("done", [0, 1, 7, 19])
def test_restored_iterator_gives_the_remaining_batches(dataset: PackedDataset, done: int) -> None:
    batches = list(iterator(dataset))
    interrupted = iterator(dataset)
    for _ in range(done):
        next(interrupted)
    state = interrupted.get_state()
    fresh = iterator(dataset)
    next(fresh)  # wherever it stands before
    fresh.set_state(state)
    rest = list(fresh)
    assert len(rest) == 20 - done
    for ours, theirs in zip(rest, batches[done:], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_batch_is_sent_while_the_one_before_is_used_and_keeps_its_own_place(dataset: PackedDataset) -> None:
    """The iterator is one ahead; what was used last says where a run goes on, not how far it has read."""
    ahead, mesh, batches = iterator(dataset), make_mesh(MeshConfig()), list(iterator(dataset))
    used = pipeline.on_devices(ahead, mesh, 4)
    for number in range(3):
        batch, position = next(used)
        np.testing.assert_array_equal(np.asarray(batch["tokens"]), batches[number]["tokens"])
        fresh = iterator(dataset)
        fresh.set_state(position)
        np.testing.assert_array_equal(next(fresh)["tokens"], batches[number + 1]["tokens"])
        assert ahead.get_state() != position
    assert len(list(used)) == 20 - 3


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_global_batch_is_the_same_on_every_mesh(dataset: PackedDataset, axes: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**axes))
    expected = dataset.batch([5, 0, 3, 6, 1, 1, 2, 4])
    local = pipeline.local_rows(mesh, 8)
    assert local.tolist() == list(range(8))  # one process holds them all
    batch: Any = pipeline.to_devices({name: array[local] for name, array in expected.items()}, mesh, 8)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(batch[name]), array)
        assert batch[name].dtype == array.dtype
        assert batch[name].sharding.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"))), array.ndim)
        shards = batch[name].addressable_shards
        assert {len(shard.data) for shard in shards} == {8 // (axes.get("data", 1) * axes.get("fsdp", 1))}


def test_processes_with_a_part_of_the_rows_make_one_batch(dataset: PackedDataset) -> None:
    first, second = (pipeline._Steps(dataset, 4, 5, 2, np.array(rows)) for rows in ([0, 1], [2, 3]))
    for step, batch in enumerate(iterator(dataset, batch_rows=4, steps=5, seed=2)):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([first[step][name], second[step][name]]))


def test_rows_that_do_not_spread_over_the_devices_are_refused(dataset: PackedDataset) -> None:
    with pytest.raises(
        UserError, match=r"train\.rows=6 does not divide by mesh\.data x mesh\.fsdp = 4; use a multiple"
    ):
        pipeline.local_rows(make_mesh(MeshConfig()), 6)
    assert pipeline.local_rows(make_mesh(MeshConfig(data=2, tensor=2)), 6).tolist() == list(range(6))


def test_evaluation_sees_every_row_once_and_pads_the_last_batch(dataset: PackedDataset) -> None:
    batches = list(pipeline.eval_batches(dataset, make_mesh(MeshConfig()), 4))
    assert [[list(members) for members in rows] for _, rows in batches] == [
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[8, 9], [10, 11], [12, 13], []],
    ]
    assert [row_numbers(batch) for batch, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 0]]
    padding = batches[1][0]
    assert not np.asarray(padding["segment_ids"])[3].any() and not np.asarray(padding["target_weights"])[3].any()
    assert (np.asarray(padding["slots"])[3] == -1).all()


@pytest.mark.parametrize("block", [1, 40, 1 << 28])
def test_digest_is_of_the_gathered_vectors_whatever_the_block(
    dataset: PackedDataset, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in checkpoints: a run that was begun when the vectors were in memory goes on."""
    monkeypatch.setattr(pipeline, "_BLOCK", block)
    held, examples = dataset.vectors.gather(), dataset.examples
    expected = hashlib.sha256(held.tobytes())
    for array in (examples.tokens, examples.is_target, examples.ends, dataset.rows.values):
        expected.update(array.tobytes())
    assert dataset.digest() == expected.digest()
    places = np.random.default_rng(0).permutation(20)[: len(held)]  # the same vectors, elsewhere in a table
    table = np.zeros((20, 3), np.float16)
    table[places] = held
    source = UserTable([f"u{n}" for n in range(20)], table, "table")
    assert dataclasses.replace(dataset, vectors=Vectors(source, places)).digest() == expected.digest()
    null = dataclasses.replace(dataset, vectors=Vectors(source, np.where(places == places[0], -1, places)))
    assert null.digest() != expected.digest()
    assert np.isnan(null.batch([0])["user_embeddings"][0, 0]).all()


def test_efficiency_is_the_share_of_tokens(dataset: PackedDataset) -> None:
    assert dataset.efficiency == 6 / 8


def test_packed_rows_give_every_example_its_own_vector(make_tokenizer: Any) -> None:
    from test_encode import make_encoder

    encoder = make_encoder(make_tokenizer(), "in_chat", num_tokens=2, seq_len=256)
    records = [synthetic.record(user) for user in range(40)]
    vectors = np.stack([synthetic.vector(user) for user in range(40)])
    data = pipeline.pack([encoder.encode(record, "e2p") for record in records], Vectors.of(vectors), encoder)
    batch = data.batch(range(len(data.rows)))
    for row, members in enumerate(data.rows):
        for segment, number in enumerate(members):
            inside = batch["segment_ids"][row] == segment + 1
            np.testing.assert_array_equal(batch["tokens"][row, inside], encoder.encode(records[number], "e2p").tokens)
            slots = batch["slots"][row, inside]
            for slot in slots[slots >= 0]:
                np.testing.assert_array_equal(batch["user_embeddings"][row, slot // 2], vectors[number])
            assert (slots >= 0).sum() == 2
    assert data.efficiency == (batch["segment_ids"] > 0).mean()
