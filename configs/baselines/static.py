"""Prompt tuning: one learned soft token for everybody: the quickstart's data.

`e2p compare CONFIG` makes the same of any config.
"""

from e2p_jax.baselines import static
from e2p_jax.config import load_config

config = static(load_config("quickstart")[1])
