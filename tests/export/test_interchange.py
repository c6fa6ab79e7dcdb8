"""A run does not care in which form its backbone is: it opens, scores, exports and comes back the same."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers import load_backbone

from e2p_jax.backbone.convert import convert
from e2p_jax.backbone.quantize import full
from e2p_jax.datasets.prepared import load_records
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.export.import_back import import_transformers
from e2p_jax.export.peft import export_peft
from e2p_jax.export.transformers import export_transformers
from e2p_jax.export.weights import export_backbone
from e2p_jax.train.run import Run, open_run


def scores(run: Run) -> np.ndarray:
    records = load_records(run.inputs.config.data.path, "all")[:4]
    return evaluate(run, records, "all", ["e2p"]).scores["e2p"].nll


@pytest.fixture(scope="module")
def runs(make_run: Callable, lively_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """One run, and itself with its backbone's path changed to the Flax form."""
    folder, run = tmp_path_factory.mktemp("interchange"), make_run()
    convert(lively_backbone, folder / "flax", str(lively_backbone), None)
    shutil.copytree(run.directory, folder / "run")
    config = run.inputs.config
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, path=str(folder / "flax")))
    (folder / "run" / "config.json").write_text(config.to_json())
    return run, open_run(folder / "run")


def test_the_same_run(runs: tuple[Run, Run]) -> None:
    hf, flax = runs
    assert flax.model.fingerprint == hf.model.fingerprint
    np.testing.assert_array_equal(scores(flax), scores(hf))


def test_the_same_exports(runs: tuple[Run, Run], lively_backbone: Path, tmp_path: Path) -> None:
    """With the tensors, byte for byte, or named as what transformers can read; and as PEFT adapters."""
    exports = [tmp_path / "hf", tmp_path / "flax"]
    for run, out in zip(runs, exports, strict=True):
        export_transformers(run, out / "whole", include_backbone=True)
        export_transformers(run, out / "named", include_backbone=False)
        export_peft(run, out / "peft", ["user-1"])
    hf, flax = (safetensors.numpy.load_file(out / "whole" / "model.safetensors") for out in exports)
    assert hf.keys() == flax.keys()
    assert all(hf[name].tobytes() == flax[name].tobytes() for name in hf)
    named = json.loads((tmp_path / "flax" / "named" / "config.json").read_text())["backbone"]
    assert named == json.loads((tmp_path / "hf" / "named" / "config.json").read_text())["backbone"]
    assert named["path"] == str(lively_backbone)
    adapters = [(out / "peft" / "user-1" / "adapter_config.json").read_text() for out in exports]
    assert adapters[0] == adapters[1]


def test_a_quantised_run_exports_the_weights_as_published(runs: tuple[Run, Run], tmp_path: Path) -> None:
    """And says so: its own scores are others."""
    shutil.copytree(runs[0].directory, tmp_path / "run")
    config = runs[0].inputs.config
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, quantization="nf4"))
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    run = open_run(tmp_path / "run")
    exact, ours = scores(runs[0]), scores(run)
    assert 0 < np.abs(ours - exact).max() < 0.2 * exact.max()
    for source, out in [(runs[0], "exact"), (run, "quantised")]:
        export_transformers(source, tmp_path / out, include_backbone=True)
    exact_files, our_files = (
        safetensors.numpy.load_file(tmp_path / out / "model.safetensors") for out in ("exact", "quantised")
    )
    assert all(our_files[name].tobytes() == tensor.tobytes() for name, tensor in exact_files.items())
    cards = [(tmp_path / out / "README.md").read_text() for out in ("exact", "quantised")]
    assert "matrices in nf4" in cards[1] and "quantisation" not in cards[0]

    export_backbone(run, tmp_path / "rounded", "float32")  # what a trained adapter would have stood beside
    computed = full(run.model.params["backbone"]["layers"])
    for name, value in nnx.to_pure_dict(nnx.state(load_backbone(tmp_path / "rounded").layers)).items():
        np.testing.assert_array_equal(value, computed[name])


def test_the_way_back(runs: tuple[Run, Run], tmp_path: Path) -> None:
    export_transformers(runs[1], tmp_path / "exported", include_backbone=True)
    data = runs[0].inputs.config.data
    import_transformers(tmp_path / "exported", tmp_path / "run", data.path, data.embeddings)
    np.testing.assert_array_equal(scores(open_run(tmp_path / "run")), scores(runs[0]))
