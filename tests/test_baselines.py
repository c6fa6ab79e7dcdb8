"""What a baseline is evaluated on by itself."""

import pytest

from e2p_jax.baselines import ARMS, BASELINES
from e2p_jax.config import Config
from e2p_jax.data.conditions import FRONTS


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "e2p"])
def test_a_baseline_is_evaluated_on_what_it_was_trained_for(name: str):
    """And under no soft token of users, of which it learned nothing."""
    config = BASELINES[name](Config())
    asked, trained = config.evaluate.conditions, config.data.condition
    assert trained in asked and ARMS[name][1] == trained
    assert not any(FRONTS[condition].reads_table for condition in asked if condition != trained)
