"""Disturbed vectors: what each disturbance is, and that the curves are those of the disturbed vectors."""

import dataclasses
import weakref
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.datasets import synthetic
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.evaluate.robustness import DISTURBANCES, dimensions, noise, robustness, rotation, staleness
from e2p_jax.train.run import open_run
from e2p_jax.vectors.source import Vectors


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Own [500, 7], another's, and a generator."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(500, 7)), rng.normal(size=(500, 7)), np.random.default_rng(1)


@pytest.mark.parametrize("width", [6, 7])
def test_rotation_turns_every_vector_by_the_angle(vectors, width: int):
    own, other, rng = vectors
    own = own[:, :width]
    turned = rotation(own, other, 60.0, rng)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(own, axis=1))
    np.testing.assert_allclose(turned @ turned.T, own @ own.T, atol=1e-9)  # one rotation for all
    if width % 2 == 0:
        cosine = (own * turned).sum(axis=1) / (own * own).sum(axis=1)
        np.testing.assert_allclose(cosine, np.cos(np.deg2rad(60)), atol=1e-9)
    np.testing.assert_allclose(rotation(own, other, 0.0, rng), own, atol=1e-9)


def test_noise_dimensions_and_staleness(vectors):
    own, other, rng = vectors
    assert (noise(own, other, 0.5, rng) - own).std() == pytest.approx(0.5, rel=0.05)
    lost = dimensions(own, other, 0.25, rng)
    assert (lost == 0).mean() == pytest.approx(0.25, abs=0.03) and (lost[lost != 0] == own[lost != 0]).all()
    np.testing.assert_allclose(staleness(own, other, 0.25, rng), 0.75 * own + 0.25 * other)


of = Vectors.of


def held(made: list[weakref.ref]) -> None:
    """A level's vectors are gone before those of the next but one are there."""
    assert sum(array() is not None for array in made) <= 2


def test_curves_are_scores_with_the_disturbed_vectors(learned_run: Path, monkeypatch: pytest.MonkeyPatch):
    run = open_run(learned_run)
    once = run.inputs.config.change(evaluate={"derangements": 1})  # what a curve ends in is one other user's vector
    run = dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=once))
    records = [synthetic.record(user) for user in range(24)]
    made: list[weakref.ref] = []
    monkeypatch.setattr(
        Vectors, "of", classmethod(lambda cls, array: made.append(weakref.ref(array)) or held(made) or of(array))
    )
    points = {(p.disturbance, p.level): p for p in robustness(run, records)}
    assert len(made) == sum(len(levels) for _, _, levels in DISTURBANCES.values())
    table = evaluate(run, records, "all", ["e2p", "none", "mean", "shuffled"])
    expected = {name: scores.per_target for name, scores in table.scores.items()}
    for place, name in {
        ("as trained", 0.0): "e2p",
        ("none", 0.0): "none",
        ("cold start", 0.0): "mean",
        ("staleness", 1.0): "shuffled",
        ("noise", 0.0): "e2p",
    }.items():
        assert points[place].nll == pytest.approx(expected[name], rel=1e-4), place
        assert points[place].low <= points[place].nll <= points[place].high
    assert expected["e2p"] < expected["shuffled"] - 0.1  # the run knows its users
    for name, (_, _, levels) in DISTURBANCES.items():
        assert points[name, 0.0].nll < points[name, levels[-1]].nll - 0.05, name
