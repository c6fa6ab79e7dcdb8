"""LoRA adapters, nothing in front: the quickstart's data.

`e2p compare CONFIG` makes the same of any config.
"""

from e2p_jax.baselines import lora
from e2p_jax.config import load_config

config = lora(load_config("quickstart")[1])
