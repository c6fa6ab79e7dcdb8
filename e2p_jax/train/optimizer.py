"""The optimizer, wrapped by the mask: clip, AdamW, warm-up and cosine see the trainable part only."""

import fnmatch
from typing import Any

import jax
import optax

from e2p_jax.config import TrainConfig
from e2p_jax.train.partition import path_name

# What a parameter of the backbone is for, by the last part of its path. Its shape does not tell: a norm, stacked over
# layers, has two axes.
_ROLES = {
    "matrix": (
        *("[qkvo]", "q_gate", "q_latent", "latent", "k_shared", "gate", "up", "down", "router", "shared_*[a-z]"),
        *("expert_gate", "expert_up", "expert_down", "linear_[qkvo]", "linear_?_taps", "linear_gate"),
        *("linear_write", "linear_decay"),
    ),
    "embedding": ("embedding", "position_embedding", "head"),
    "norm": ("*norm",),
    "bias": ("bias", "*_bias", "sinks", "linear_log_rate"),
}
_DECAYING = ("matrix", "embedding")


def decays(path: str, axes: int) -> bool:
    """Tells whether weight decay reaches a parameter: what multiplies is drawn to zero, what shifts or scales is not.

    Raises:
      ValueError: the table of roles does not say what it is.
    """
    if not path.startswith("backbone/"):
        is_plain = path.startswith(("projector/", "items/"))
        return axes > (1 if is_plain else 2)  # those of adapters are stacked over layers
    name = path.rpartition("/")[2]
    roles = [role for role, patterns in _ROLES.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if len(roles) != 1:
        raise ValueError(f"parameter {path} has the roles {roles}; give it one in {__name__}")
    return roles[0] in _DECAYING


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then a cosine down to `final_learning_rate` of the peak at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_learning_rate,
    )


def shared_rates(config: TrainConfig, params: Any) -> dict[str, float]:
    """Path of what all users share, a projector's `bias` and `shared` tokens -> how many times as fast it learns:
    sqrt(E), of its `skip` [E, ...], if `bias_learning_rate` does not say.

    AdamW moves every number alike. The E numbers of a standardised vector are about 1, so what a matrix makes of them
    moves sqrt(E) times as far; with a bias no faster than one of them, what all users have in common is learned by what
    tells them apart, and the mean vector, which tells nothing, is left where no soft token ever was.

    Args:
      params: all parameters, or their shapes.
    """
    projector = params.get("projector", {})
    by_width = projector["skip"].shape[0] ** 0.5 if "skip" in projector else 1.0
    given = config.bias_learning_rate
    rate = given / config.learning_rate if given else by_width
    return {f"projector/{name}": rate for name in ("bias", "shared") if name in projector}


def make_optimizer(config: TrainConfig, mask: Any, params: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) inside the mask. A clip outside of it would read a
    frozen gradient that does not exist, and clip on the wrong norm.

    Args:
      params: all parameters, or their shapes (`shared_rates`).
    """
    rates = shared_rates(config, params)
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config),
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, leaf: decays(path_name(path), leaf.ndim), params
            ),
        ),
        optax.stateless(
            lambda updates, _: jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf * rates.get(path_name(path), 1.0), updates
            )
        ),
    )
    return optax.masked(inner, mask)
