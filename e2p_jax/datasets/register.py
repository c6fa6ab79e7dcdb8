"""Importing this module registers our builders with TensorFlow Datasets.

Then `tfds.builder("pens", data_dir=...)`, `tfds.data_source(...)` and, where TensorFlow is installed, `tfds.load(...)`
know the names of `registry.DATASETS`.
"""

from e2p_jax.registry import DATASETS

BUILDERS = {name: dataset.load() for name, dataset in DATASETS.items()}
