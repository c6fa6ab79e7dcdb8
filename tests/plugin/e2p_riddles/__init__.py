"""A plugin: a line for each thing that it adds, light, for every command imports it."""

import dataclasses

from e2p_jax import baselines, registry
from e2p_jax.config import Config
from e2p_jax.registry import Choice, Export


def bounded(config: Config) -> Config:
    """A baseline: the same config with the projector of this package."""
    return dataclasses.replace(config, projector=dataclasses.replace(config.projector, kind="bounded"))


registry.PROJECTORS["bounded"] = Choice("e2p_riddles.bounded", "tanh of a matrix")
registry.ADAPTERS["scale"] = Choice("e2p_riddles.scale", "a factor for each thing that a matrix gives")
registry.DATASETS["riddles"] = Choice("e2p_riddles.dataset:Riddles", "riddles")
registry.ENCODERS["lengths"] = Choice("e2p_riddles.lengths:embed", "lengths of the texts of a context")
registry.EXPORTS["norms"] = Export("e2p_riddles.exports:export_norms", "a file")
registry.EXPORTS["names"] = Export("e2p_riddles.exports:list_names", "lines")
baselines.BASELINES["bounded"] = bounded
baselines.ARMS["bounded"] = ("bounded", "e2p")
