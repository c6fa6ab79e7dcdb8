"""The projector against its formula, and its first outputs against the backbone's tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e2p_jax.errors import UserError
from e2p_jax.prefix import blocks, linear, mlp
from e2p_jax.prefix.numpy_projector import project
from e2p_jax.prefix.projector import Projector, Statistic
from e2p_jax.vectors.population import Population


def make(
    kind: Any = "mlp", *, e: int = 6, d: int = 5, k: int = 1, dropout: float = 0.0, null: float = 0.0, seed: int = 0
) -> Projector:
    kinds = {"mlp": mlp.Settings, "blocks": blocks.Settings}
    own = kinds[kind](hidden_size=4 * e, dropout=dropout) if kind in kinds else linear.Settings()
    settings = dataclasses.replace(own, num_tokens=k, max_scale=0.0)
    return Projector(settings, embedding_width=e, model_width=d, null_user_rate=null, rngs=nnx.Rngs(seed))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_formula_and_shapes(kind: str, k: int, lead: tuple[int, ...]) -> None:
    projector = make(kind, k=k)
    # Biases and statistics are 0 and 1 at first, which would hide them.
    state = jax.tree.map(lambda value: 0.1 + jnp.abs(normal(*value.shape, seed=value.size)), nnx.state(projector))
    nnx.update(projector, state)
    vectors = normal(*lead, 6, seed=9)
    p = {name: np.asarray(value) for name, value in nnx.to_pure_dict(nnx.state(projector)).items()}
    x = (vectors - p["input_mean"]) / p["input_std"]
    y = x @ p["skip"] + p["bias"]
    if kind == "mlp":
        h = x @ p["up"] + p["up_bias"]
        y = y + (h / (1 + np.exp(-h))) @ p["down"]
    expected = p["token_mean"] + p["token_std"] * y.reshape(*lead, k, 5)
    soft = projector(jnp.asarray(vectors))
    assert soft.shape == (*lead, k, 5)
    assert soft.dtype == jnp.float32
    np.testing.assert_allclose(soft, expected, rtol=1e-4, atol=1e-5)


def test_a_block_is_projected_as_a_vector_by_itself() -> None:
    """By `mlp` with the same matrices and a bias a place, in JAX and NumPy; one that has no K blocks is refused."""
    several, single = make("blocks", e=6, k=3), make(e=2)
    single.up, single.up_bias, single.down = several.up, several.up_bias, several.down
    single.skip = several.skip
    bias = normal(3, 5, seed=5)
    several.bias[...] = jnp.asarray(bias.reshape(15))
    vectors = normal(4, 6, seed=3)
    soft = several(jnp.asarray(vectors))
    assert soft.shape == (4, 3, 5)
    alone = single(jnp.asarray(vectors.reshape(4, 3, 2)))[:, :, 0]
    np.testing.assert_allclose(soft, np.asarray(alone) + bias, rtol=1e-5, atol=1e-6)
    p = {name: np.asarray(value) for name, value in nnx.to_pure_dict(nnx.state(several)).items()}
    ours = project(dataclasses.asdict(several.settings), p, vectors, np.dtype("float32"))
    np.testing.assert_allclose(ours, soft, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"user vectors of 7 numbers are not 3 vectors side by side .*--blocks 3"):
        make("blocks", e=7, k=3)


@pytest.mark.parametrize("kind", ["mlp", "linear", "blocks"])
def test_shared_tokens_stand_behind_the_users_own(kind: str) -> None:
    """The others are what they would be alone; in NumPy, too."""
    alone = make(kind, k=2)
    alone.bias[...] = jnp.asarray(normal(10, seed=4))
    settings = dataclasses.replace(alone.settings, num_tokens=4, shared_tokens=2)
    several = Projector(settings, embedding_width=6, model_width=5, rngs=nnx.Rngs(1))
    assert np.all(several.shared[...] == 0)  # the mean of the token embeddings
    parameters = nnx.to_pure_dict(nnx.state(alone))
    parameters |= {"token_mean": jnp.asarray(normal(5, seed=6)), "token_std": jnp.abs(jnp.asarray(normal(5, seed=7)))}
    shared = normal(2, 5, seed=5)
    nnx.update(alone, nnx.State(parameters))
    nnx.update(several, nnx.State(parameters | {"shared": jnp.asarray(shared.reshape(10))}))
    vectors = normal(3, 6, seed=3)
    soft = several(jnp.asarray(vectors))
    np.testing.assert_array_equal(soft[:, :2], alone(jnp.asarray(vectors)))
    expected = np.asarray(parameters["token_mean"]) + np.asarray(parameters["token_std"]) * shared
    np.testing.assert_allclose(soft[:, 2:], np.broadcast_to(expected, (3, 2, 5)), rtol=1e-6)
    p = {name: np.asarray(value) for name, value in nnx.to_pure_dict(nnx.state(several)).items()}
    ours = project(dataclasses.asdict(settings), p, vectors, np.dtype("float32"))
    np.testing.assert_allclose(ours, soft, rtol=1e-5, atol=1e-5)


def test_no_vector_gives_a_token_beyond_the_bound() -> None:
    """Of any length, noise or nothing; below the bound a token is what it was, and above it directions learn on."""
    tokens = jnp.asarray(0.3 + normal(100, 5, seed=1))
    unit = np.sqrt(np.mean(np.square(tokens)))
    bounded, free = (
        Projector(
            linear.Settings(max_scale=most, init_scale=0.5, num_tokens=2),
            embedding_width=6,
            model_width=5,
            rngs=nnx.Rngs(0),
        )
        for most in (4.0, 0.0)
    )
    for projector in (bounded, free):
        projector.calibrate(jnp.zeros(6), jnp.ones(6), tokens, 0.5)
    assert float(bounded.bound) == pytest.approx(4 * unit, rel=1e-5)
    vectors = jnp.asarray(np.concatenate([normal(40, 6), 1e3 * normal(40, 6), 1e6 * normal(40, 6), np.zeros((1, 6))]))
    soft, before = bounded(vectors), free(vectors)
    rms, was = (np.sqrt(np.mean(np.square(np.asarray(each)), axis=-1)) for each in (soft, before))
    assert (was[40:-1] > 4 * unit).any() and rms.max() <= 4 * unit * 1.0001
    np.testing.assert_array_equal(soft[was < 3.9 * unit], before[was < 3.9 * unit])
    np.testing.assert_allclose(soft[80] / rms[80, :, None], before[80] / was[80, :, None], rtol=1e-4, atol=1e-5)

    graph, state = nnx.split(bounded)
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(vectors)[40:, 0, 0]))(state)
    assert np.isfinite(gradient["skip"][...]).all() and np.abs(gradient["skip"][...]).max() > 1e-3


def calibrated(kind: str, seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Soft tokens of 2000 users whose vectors are far from standard, and the token embeddings they should resemble."""
    users = 3.0 + 20.0 * normal(2000, 64, seed=seed) * np.linspace(0.01, 3, 64, dtype=np.float32)
    tokens = 0.2 * normal(512, seed=seed + 1) + normal(300, 512, seed=seed + 2) * np.linspace(
        0.01, 0.1, 512, dtype=np.float32
    )
    projector = make(kind, e=64, d=512, seed=seed)
    projector.calibrate(*Population.of(users), jnp.asarray(tokens), scale)
    return np.asarray(projector(jnp.asarray(users)))[:, 0], tokens


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_calibrated_soft_tokens_look_like_tokens(kind: str, seed: int) -> None:
    """A dimension sums 64 random terms: its spread is off by about 1/8, its mean (SiLU's own) by about 1/4 of a
    spread; over 512 dimensions both average out.
    """
    soft, tokens = calibrated(kind, seed)
    z = (soft - tokens.mean(0)) / tokens.std(0)
    assert abs(z.mean()) < 0.05
    assert np.sqrt(np.square(z).mean()) == pytest.approx(1.0, abs=0.07)
    assert np.abs(z.mean(0)).max() < 1.2
    assert 0.5 < np.sqrt(np.square(z).mean(0)).min() < np.sqrt(np.square(z).mean(0)).max() < 1.7
    assert np.sqrt(np.square(soft).mean()) == pytest.approx(np.sqrt(np.square(tokens).mean()), rel=0.05)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_init_scale_scales(scale: float) -> None:
    np.testing.assert_allclose(calibrated("mlp", 0, scale)[0], scale * calibrated("mlp", 0)[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_tokens_calibrate_in_float32() -> None:
    tokens = 100.0 + normal(4000, 5)
    projector = make()
    projector.calibrate(*Population.of(normal(50, 6)), jnp.asarray(tokens, jnp.bfloat16), 1.0)
    np.testing.assert_allclose(projector.token_mean[...], tokens.mean(0), rtol=1e-3)
    assert projector.token_mean[...].dtype == jnp.float32


def test_dropout_needs_a_key_and_keeps_the_mean() -> None:
    projector, vectors = make(dropout=0.3), jnp.asarray(normal(3, 6))
    plain = projector(vectors)
    np.testing.assert_array_equal(plain, projector(vectors))
    dropped = projector(jnp.broadcast_to(vectors, (4000, 3, 6)), jax.random.key(0))
    assert (np.std(dropped, axis=0) > 0.01).all()
    error = np.std(dropped, axis=0) / 4000**0.5
    assert (np.abs(np.mean(dropped, axis=0) - plain) < 5 * error).all()
    for other in (make(dropout=0.0), make("linear", dropout=0.3)):
        np.testing.assert_array_equal(other(vectors, jax.random.key(0)), other(vectors))


def test_noise_is_in_units_of_the_training_users_spread() -> None:
    """Of a linear projector the output's noise is the noise through the matrix; only in training."""
    projector, vectors = make("linear"), jnp.asarray(normal(1, 6))
    projector.settings = dataclasses.replace(projector.settings, noise=0.5)
    projector.input_std[...] = jnp.full((6,), 100.0)
    many = jnp.broadcast_to(vectors, (20_000, 6))
    noisy, plain = np.asarray(projector(many, jax.random.key(0)))[:, 0], np.asarray(projector(vectors))[0, 0]
    np.testing.assert_allclose(noisy.mean(axis=0), plain, atol=0.03)
    expected = 0.5 * np.linalg.norm(np.asarray(projector.skip[...]), axis=0)
    np.testing.assert_allclose(noisy.std(axis=0), expected, rtol=0.03)
    np.testing.assert_allclose(np.asarray(projector(many))[:, 0], np.broadcast_to(plain, noisy.shape), atol=1e-6)


def test_null_user_stands_for_vectors_of_nan() -> None:
    projector, vectors = make(null=0.25), normal(8, 6)
    projector.calibrate(*Population.of(3.0 + normal(50, 6)), jnp.asarray(normal(20, 5)), 1.0)
    mean = projector(projector.input_mean[...][None])
    absent = vectors.copy()
    absent[[2, 5]] = np.nan
    soft = projector(jnp.asarray(absent))
    np.testing.assert_allclose(soft[2:3], mean, atol=1e-5)  # before training: the mean user
    projector.null_user[...] = jnp.asarray(normal(6, seed=3))
    learned = projector(jnp.asarray(absent))
    np.testing.assert_array_equal(learned[2], learned[5])
    assert np.abs(np.asarray(learned[2] - soft[2])).max() > 0.1
    rest = np.array([0, 1, 3, 4, 6, 7])
    np.testing.assert_array_equal(learned[rest], projector(jnp.asarray(vectors))[rest])


def test_training_drops_users_at_the_rate() -> None:
    projector, vectors = make(null=0.25), jnp.asarray(normal(4000, 6))
    null = np.asarray(projector(jnp.full((1, 6), jnp.nan)))
    dropped = (np.asarray(projector(vectors, jax.random.key(0))) == null).all(axis=(1, 2))
    assert pytest.approx(float(dropped.mean()), abs=5 * (0.25 * 0.75 / 4000) ** 0.5) == 0.25
    assert not (np.asarray(projector(vectors)) == null).all(axis=(1, 2)).any()

    def total(projector: Projector) -> jax.Array:
        return jnp.sum(projector(jnp.where(jnp.asarray(dropped)[:, None], jnp.nan, vectors)))

    gradient = nnx.grad(total)(projector)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(np.asarray(gradient["null_user"][...])).max() > 0


def test_statistics_are_no_parameters() -> None:
    assert "null_user" in nnx.state(make(null=0.1), nnx.Param)
    projector = make()
    assert set(nnx.state(projector, nnx.Param)) == {"skip", "bias", "up", "up_bias", "down"}
    assert set(nnx.state(projector, Statistic)) == {"input_mean", "input_std", "token_mean", "token_std"}
    assert set(nnx.state(make("linear"), nnx.Param)) == {"skip", "bias"}


def test_a_vector_of_another_width_is_refused() -> None:
    with pytest.raises(AssertionError, match="to have dimension equal to '6'"):
        make()(jnp.zeros((2, 7)))
