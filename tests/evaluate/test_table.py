"""Paired bootstrap and perplexity against plain NumPy and SciPy's bootstrap."""

import math

import numpy as np
import pytest
import scipy.stats

from e2p_jax.evaluate.score import Scores
from e2p_jax.evaluate.table import paired_bootstrap


def scores(nll: np.ndarray, targets: np.ndarray) -> Scores:
    return Scores(nll.astype(np.float64), targets, targets * 2)


def test_interval_agrees_with_scipy():
    rng = np.random.default_rng(0)
    targets = rng.integers(10, 60, 300)
    base = targets * rng.normal(4, 0.3, 300)
    ours = base - targets * rng.normal(0.02, 0.1, 300)
    result = paired_bootstrap(scores(ours, targets), scores(base, targets), [f"u{i}" for i in range(300)], 5000)

    def ratio(difference: np.ndarray, size: np.ndarray, axis: int) -> np.ndarray:
        return difference.sum(axis) / size.sum(axis)

    expected = scipy.stats.bootstrap(
        (ours - base, targets), ratio, paired=True, n_resamples=5000, method="percentile", rng=1
    ).confidence_interval
    assert result.mean == pytest.approx((ours - base).sum() / targets.sum())
    assert result.low == pytest.approx(expected.low, abs=1e-3)
    assert result.high == pytest.approx(expected.high, abs=1e-3)


def test_users_are_resampled_whole():
    """A user's dialogues move together: one odd user among four widens the interval far beyond its records' share."""
    nll, targets = np.zeros(400), np.full(400, 10)
    odd = np.where(np.arange(400) < 100, -10.0, 0.0)
    users = [f"u{i // 100}" for i in range(400)]
    clustered = paired_bootstrap(scores(odd, targets), scores(nll, targets), users, 4000)
    alone = paired_bootstrap(scores(odd, targets), scores(nll, targets), [f"u{i}" for i in range(400)], 4000)
    assert clustered.high == 0.0 and clustered.low < -0.7
    assert -0.32 < alone.low < alone.high < -0.18


def test_word_perplexity():
    s = Scores(np.array([2.0, 4.0]), np.array([3, 3]), np.array([1, 2]))
    assert s.word_perplexity == pytest.approx(math.exp(2.0)) and s.per_target == pytest.approx(1.0)
