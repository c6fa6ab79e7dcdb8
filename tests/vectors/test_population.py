"""Statistics of the training users' vectors: right whatever the scale, and refused where they say nothing."""

import dataclasses
import re
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e2p_jax.config import Condition, Config, DataConfig
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.prepared import load_table
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.errors import UserError
from e2p_jax.prefix import mlp
from e2p_jax.prefix.projector import Projector
from e2p_jax.train.loop import Data, read_data
from e2p_jax.train.setup import read_inputs
from e2p_jax.vectors import population as module
from e2p_jax.vectors.population import Population, training_population
from e2p_jax.vectors.table import UserTable, save_table

VECTORS = np.random.default_rng(0).normal(3.0, 2.0, (400, 6)) * np.array([1, 1, 1e-3, 1e3, 1, 1])


def table_of(vectors: np.ndarray) -> UserTable:
    return UserTable([f"u{row}" for row in range(len(vectors))], np.asarray(vectors), "the table")


def measured(vectors: np.ndarray, *, told_apart: bool = True) -> tuple[Population, list[str]]:
    table = table_of(np.asarray(vectors, np.float32))
    return training_population(table, np.arange(len(vectors)), told_apart=told_apart)


@pytest.mark.parametrize("block", [1, 100 * 4 * 6, 1 << 24])
def test_statistics_are_those_of_float64(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows that are asked for, in any order, a block at a time, with a mean far beyond the spread."""
    monkeypatch.setattr(module, "_BLOCK", block)
    vectors = np.random.default_rng(2).normal(1e4, 0.1, (400, 6)).astype(np.float32)
    rows = np.random.default_rng(1).permutation(400)[:300]
    found, warnings = training_population(table_of(vectors), rows, told_apart=True)
    exact = vectors[rows].astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.std, exact.std(axis=0), rtol=1e-6)
    assert found.mean.dtype == found.std.dtype == np.float32 and warnings == []
    np.testing.assert_allclose(Population.of(vectors[rows]).std, found.std, rtol=1e-6)


def test_the_table_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    users = 50_000
    vectors = np.random.default_rng(0).normal(size=(users, 128)).astype(np.float16)
    save_table(tmp_path / "t", [str(user) for user in range(users)], vectors, name="n", version="1")
    table = load_table(str(tmp_path / "t"))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module, "_BLOCK", 1 << 20)
    tracemalloc.start()
    training_population(table, np.arange(users), told_apart=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    monkey.undo()
    assert peak < users * 128 * 4 / 2


def soft_tokens(vectors: np.ndarray) -> np.ndarray:
    """[N, D] of a fresh projector in front of users' vectors, standardised as a training would."""
    found, _ = measured(vectors)
    settings = mlp.Settings(hidden_size=24, dropout=0.0)
    projector = Projector(settings, embedding_width=6, model_width=5, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    projector.calibrate(jnp.asarray(found.mean), jnp.asarray(found.std), jnp.asarray(tokens), 1.0)
    return np.asarray(projector(jnp.asarray(vectors, jnp.float32)))[:, 0]


@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1e8, 1e25])
def test_the_scale_of_a_table_has_no_say(scale: float) -> None:
    """Nor does it in a dimension that never varied, where a user comes who differs there."""
    vectors = VECTORS.copy()
    vectors[:, 4], vectors[:, 5] = 7.0, 0.0
    plain = soft_tokens(vectors)
    assert plain.std(axis=0).min() > 0.1
    np.testing.assert_allclose(soft_tokens(vectors * scale), plain, rtol=1e-4, atol=1e-4)
    a, b = measured(vectors)[0], measured(vectors * scale)[0]
    other = np.array([1.0, 2.0, 3.0, 4.0, 8.0, 1.0])
    np.testing.assert_allclose((other * scale - b.mean) / b.std, (other - a.mean) / a.std, rtol=1e-4)
    assert np.abs((other - a.mean) / a.std)[4:].max() < 1  # not blown up


@pytest.mark.parametrize("scale", [1.0, 1e20])
def test_a_dead_dimension_of_an_encoder_is_constant(scale: float) -> None:
    """all-MiniLM-L6-v2 has two of its 384 dimensions near 1e-33, different for everybody."""
    vectors = VECTORS * np.array([scale, scale, scale, scale, scale, 1e-33 * scale])
    with np.errstate(under="ignore"):
        found, warnings = measured(vectors)
    np.testing.assert_allclose(found.std[5], np.sqrt(np.mean(found.std[:5].astype(np.float64) ** 2)), rtol=1e-5)
    assert warnings == []


def test_rounding_is_no_difference_between_users() -> None:
    vectors = VECTORS.copy()
    vectors[:, 2] = 1e6 * (1 + 1e-7 * np.random.default_rng(2).normal(size=400))
    found, _ = measured(vectors)
    assert np.abs((vectors[:, 2] - found.mean[2]) / found.std[2]).max() < 1e-5


@pytest.mark.parametrize("vectors", [np.zeros((30, 4)), np.full((30, 4), 0.1), np.ones((2, 4))], ids=str)
def test_vectors_that_are_all_the_same_are_refused(vectors: np.ndarray) -> None:
    """Unless the condition gives all users the same one anyway, or there is only one user."""
    with pytest.raises(UserError, match=rf"the table: all {len(vectors)} training users have the same vector"):
        measured(vectors)
    for found, _ in (measured(vectors, told_apart=False), measured(vectors[:1])):
        np.testing.assert_array_equal(found.mean, vectors[0].astype(np.float32))
        assert np.isfinite(found.std).all() and (found.std > 0).all()


@pytest.mark.parametrize(("scale", "what"), [(1e-41, "vary by"), (1e-33, "vary by"), (3e32, "vary by .*e\\+3")])
@pytest.mark.parametrize("told_apart", [True, False])
def test_what_float32_cannot_standardise_is_refused(scale: float, what: str, told_apart: bool) -> None:
    with pytest.raises(UserError, match=rf"the table: in dimension \d the .* {what}.*; multiply the table by a number"):
        measured(VECTORS * scale, told_apart=told_apart)


def test_a_mean_that_float32_cannot_subtract_is_refused() -> None:
    with pytest.raises(UserError, match=r"in dimension 0 the training users' vectors have a mean of 1\.0e\+34"):
        measured(VECTORS[:9, :1] * 1e29 + 1e34)


@pytest.mark.parametrize(("users", "size"), [(400, 1e20), (400, -1e5), (12, 1e6), (100, 1e6)])
@pytest.mark.parametrize("outliers", [1, 2])
def test_users_who_swamp_the_others_are_named(users: int, size: float, outliers: int) -> None:
    vectors = VECTORS[:users].copy()
    vectors[3 : 3 + outliers] = size
    vectors[3 : 3 + outliers, 3] = 1e3 * size
    named = ", ".join(repr(f"u{row}") for row in range(3, 3 + outliers))
    with pytest.raises(UserError, match=re.escape(f"the numbers of {outliers} of {users} training users ({named})")):
        measured(vectors)
    assert measured(vectors, told_apart=False)[1] == []


def test_a_dimension_of_an_outlier_is_a_warning() -> None:
    vectors = VECTORS.copy()
    vectors[7, 1] = 1e9
    found, (warning,) = measured(vectors)
    assert "in 1 of 6 dimensions the numbers of 1 of 400 training users ('u7')" in warning
    assert np.isfinite(found.std).all()


@pytest.mark.parametrize("kind", ["normal", "one-hot", "rare", "counts", "two groups"])
def test_ordinary_tables_are_not_warned_of(kind: str) -> None:
    rng = np.random.default_rng(3)
    vectors = {
        "normal": rng.normal(size=(3000, 8)),
        "one-hot": np.eye(40),
        "rare": (rng.random((3000, 8)) < 0.002).astype(float) * rng.normal(size=(3000, 8)),
        "counts": np.round(rng.lognormal(1, 2, (3000, 8))),
        "two groups": np.repeat([[-1e6, 0.0], [1e6, 1.0]], 50, axis=0) + rng.normal(size=(100, 2)),
    }[kind]
    assert measured(vectors)[1] == []


def test_a_vector_that_is_not_finite_is_named() -> None:
    vectors = VECTORS.astype(np.float32)
    vectors[5, 0] = np.nan
    with pytest.raises(UserError, match=r"row 5 \(user 'u5'\) holds NaN"):
        measured(vectors)


def test_training_refuses_or_warns_by_what_its_condition_asks_of_vectors(tmp_path: Path) -> None:
    """Before anything is compiled; each user counts once, however many records they have."""
    users = range(12)
    write_jsonl([synthetic.record(user) for user in [*users, 3, 3]], tmp_path / "r.jsonl")

    def read(vectors: np.ndarray, condition: Condition) -> Data:
        save_table(tmp_path / "t", [f"user-{user}" for user in users], vectors, name="n", version="1")
        data = DataConfig(
            path=str(tmp_path / "r.jsonl"), embeddings=str(tmp_path / "t"), train_split="all", cache="none"
        )
        data = dataclasses.replace(data, eval_splits=("all",), condition=condition, seq_len=128)
        return read_data(read_inputs(Config(data=data)))

    vectors = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    np.testing.assert_allclose(read(vectors, "e2p").population.mean, vectors.mean(axis=0), rtol=1e-5)
    same = np.ones_like(vectors)
    with pytest.raises(UserError, match="all 12 training users have the same vector"):
        read(same, "e2p")
    assert read(same, "static").warnings == []
    vectors[7, 0] = 1e9
    (warning,) = read(vectors, "e2p").warnings
    assert "'user-7'" in warning
