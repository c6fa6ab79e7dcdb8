"""The optimizer, wrapped by the mask: clip, AdamW, warm-up and cosine see the trainable part only."""

from typing import Any

import jax
import optax

from e2p_jax.config import TrainConfig


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then a cosine down to `final_learning_rate` of the peak at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_learning_rate,
    )


def make_optimizer(config: TrainConfig, mask: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) inside the mask. A clip outside of it would read a
    frozen gradient that does not exist, and clip on the wrong norm.
    """
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config),
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
    return optax.masked(inner, mask)
