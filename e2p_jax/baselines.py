"""Baselines of a run: the same config with another thing trained, or another thing in front.

All go through the one mask and the one loop, and alone each is evaluated on what it was trained for. Learning rates are
a multiple of the config's own, which is the projector's.
"""

from collections.abc import Callable

from e2p_jax.config import Condition, Config


def e2p(config: Config) -> Config:
    """The config as it is: a projector of the user's vector."""
    return config.change(data={"condition": "e2p"})


def e2p_text(config: Config) -> Config:
    """The soft token with the context spelled out behind it."""
    return config.change(data={"condition": "e2p+text"}, evaluate={"conditions": ("none", "text", "e2p+text")})


def static(config: Config) -> Config:
    """Learned soft tokens for everybody: prompt tuning (Lester et al., arXiv 2104.08691).

    A linear projector of the mean vector is its bias alone, which is all that trains.
    """
    return config.change(
        data={"condition": "static"},
        projector={"kind": "linear", "shared_tokens": 0},
        train={"trainable": ("projector/bias",)},
        evaluate={"conditions": ("none", "static")},
    )


def lora(config: Config) -> Config:
    """Low-rank adapters on every layer matrix, nothing in front: fine-tuning that knows no user."""
    return config.change(
        adapter={"kind": "lora"},
        data={"condition": "none"},
        train={"trainable": ("lora/**",), "learning_rate": config.train.learning_rate / 3},
        evaluate={"conditions": ("none", "text")},
    )


def full(config: Config) -> Config:
    """All of the backbone, nothing in front."""
    rate = config.train.learning_rate / 10
    return config.change(
        data={"condition": "none"},
        train={"trainable": ("backbone/**",), "learning_rate": rate},
        evaluate={"conditions": ("none", "text")},
    )


BASELINES: dict[str, Callable[[Config], Config]] = {
    "e2p": e2p,
    "e2p+text": e2p_text,
    "static": static,
    "lora": lora,
    "full": full,
}

# What is compared -> the run it is asked of, and what stands in front of that run's conversations. `none` and `text`
# need no training: the backbone of the `e2p` run is the frozen one.
ARMS: dict[str, tuple[str, Condition]] = {
    "none": ("e2p", "none"),
    "e2p": ("e2p", "e2p"),
    "text": ("e2p", "text"),
    "text+shuffled": ("e2p", "text+shuffled"),
    "e2p+text": ("e2p+text", "e2p+text"),
    "static": ("static", "static"),
    "lora": ("lora", "none"),
    "full": ("full", "none"),
    "shuffled": ("e2p", "shuffled"),
    "mean": ("e2p", "mean"),
    "zero": ("e2p", "zero"),
    "noise": ("e2p", "noise"),
    "extreme": ("e2p", "extreme"),
}
