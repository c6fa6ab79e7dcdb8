"""Full fine-tuning, nothing in front: the quickstart's data.

`e2p compare CONFIG` makes the same of any config.
"""

from e2p_jax.baselines import full
from e2p_jax.config import load_config

config = full(load_config("quickstart")[1])
