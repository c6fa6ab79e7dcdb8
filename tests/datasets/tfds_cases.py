"""TFDS's own tests of our builders, on small releases in the true formats; run by test_tfds_builders.py.

They need TensorFlow, which the package does not: `python tests/datasets/tfds_cases.py`, with the extra `[test-tfds]`.
"""

import shutil
import tempfile
from pathlib import Path

import releases
import tensorflow_datasets as tfds

from e2p_jax.datasets.register import BUILDERS


class OnRelease:
    """Writes the release named `RELEASE` for the tests of a class."""

    OVERLAPPING_SPLITS = ("validation_ranking",)  # the turns of `validation`

    @classmethod
    def setUpClass(cls):
        cls.EXAMPLE_DIR = tempfile.mkdtemp()
        getattr(releases, cls.RELEASE)(Path(cls.EXAMPLE_DIR))
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        shutil.rmtree(cls.EXAMPLE_DIR)


for name, (dataset, release, configs, splits) in releases.EXPECTED.items():
    settings = {
        "DATASET_CLASS": BUILDERS[dataset],
        "RELEASE": release,
        "BUILDER_CONFIG_NAMES_TO_TEST": configs,
        "SPLITS": splits,
    }
    bases = (OnRelease, tfds.testing.DatasetBuilderTestCase)
    globals()[name] = type(bases[1])(name, bases, settings)

if __name__ == "__main__":
    tfds.testing.test_main()
