"""The soft token with the context spelled out behind it: the quickstart's data.

`e2p compare CONFIG` makes the same of any config.
"""

from e2p_jax.baselines import e2p_text
from e2p_jax.config import load_config

config = e2p_text(load_config("quickstart")[1])
