"""Importing this module registers our builders with TensorFlow Datasets.

Then `tfds.builder("pens", data_dir=...)`, `tfds.data_source(...)` and, where TensorFlow is installed, `tfds.load(...)`
know `persona_chat`, `pens` and `interactions` by their names.
"""

from e2p_jax.datasets.interactions.interactions_dataset_builder import Builder as Interactions
from e2p_jax.datasets.pens.pens_dataset_builder import Builder as Pens
from e2p_jax.datasets.persona_chat.persona_chat_dataset_builder import Builder as PersonaChat

__all__ = ["Interactions", "Pens", "PersonaChat"]
