"""Our builders as TensorFlow Datasets has them: by name, prepared by it alone, and under its own tests."""

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import releases
import tensorflow_datasets as tfds

from e2p_jax.datasets.prepare import prepare
from e2p_jax.datasets.register import BUILDERS


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed ([test-tfds])")
def test_tfds_own_tests_of_our_builders():
    cases = Path(__file__).parent / "tfds_cases.py"
    done = subprocess.run([sys.executable, str(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "\nOK" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("name", releases.EXPECTED)
def test_builders_work_through_tfds_alone(tmp_path, name):
    """What TFDS's tests check, without TensorFlow: name, counts, no example in two splits, the same reloaded."""
    dataset, release, configs, splits = releases.EXPECTED[name]
    manual = getattr(releases, release)(tmp_path / "manual")
    builder_class = BUILDERS[dataset]
    assert builder_class.name in tfds.list_builders(with_community_datasets=False)
    for config in configs or [None]:
        builder = tfds.builder(f"{builder_class.name}/{config}" if config else builder_class.name, data_dir=tmp_path)
        assert isinstance(builder, builder_class) and builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        download = tfds.download.DownloadConfig(manual_dir=manual)
        builder.download_and_prepare(download_config=download, file_format="array_record")
        again = builder_class(data_dir=tmp_path, config=config)
        assert {n: split.num_examples for n, split in again.info.splits.items()} == splits
        seen = {}
        for split in splits:
            source = again.as_data_source(split)
            assert set(source[0]) == set(builder.info.features)
            seen[split] = {repr(example) for example in source}
            assert len(seen[split]) == len(source)
        for one, two in itertools.combinations(seen.keys() - {"validation_ranking"}, 2):
            assert not seen[one] & seen[two]


def test_a_dataset_is_found_by_its_name(tmp_path):
    manual = releases.pens(tmp_path / "manual")
    download = tfds.download.DownloadConfig(manual_dir=manual)
    prepare = {"download_config": download, "file_format": "array_record"}
    source = tfds.data_source("pens", split="test", data_dir=tmp_path, download_and_prepare_kwargs=prepare)
    assert source[0]["user_id"] == b"NT1" and list(source[0]["references"]) == [b"Cheap flats: again"]


def test_the_examples_of_the_page_on_data_run_as_they_stand(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    releases.pens(tmp_path / "DIR")
    prepare("interactions", releases.movielens(tmp_path / "plays"), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    seen: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, seen)
    assert capsys.readouterr().out.endswith("b'U1'\n")
    assert len(seen["history"].users) == 34 and len(seen["everything"].titles) == 38
