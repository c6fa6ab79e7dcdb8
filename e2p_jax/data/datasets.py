"""Importing this module registers our builders with TensorFlow Datasets.

Then `tfds.builder("pens", data_dir=...)`, `tfds.data_source(...)` and, where TensorFlow is installed, `tfds.load(...)`
know `persona_chat`, `pens`, `interactions` and `dialogue_corpus` by their names.
"""

from e2p_jax.data.dialogue_corpus.dialogue_corpus_dataset_builder import Builder as DialogueCorpus
from e2p_jax.data.interactions.interactions_dataset_builder import Builder as Interactions
from e2p_jax.data.pens.pens_dataset_builder import Builder as Pens
from e2p_jax.data.persona_chat.persona_chat_dataset_builder import Builder as PersonaChat

__all__ = ["DialogueCorpus", "Interactions", "Pens", "PersonaChat"]
