"""What stands where an export is to go is never lost, and what is not a number is not exported."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import untrained_run

from e2p_jax.errors import UserError
from e2p_jax.export.peft import export_peft
from e2p_jax.export.transformers import export_transformers
from e2p_jax.export.weights import export_backbone
from e2p_jax.train.run import Run


@pytest.fixture(scope="module")
def run(lively_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return untrained_run(tmp_path_factory.mktemp("places"), lively_backbone, "after_bos", 1, "mlp")


def with_params(run: Run, part: str, name: str, value: Any) -> Run:
    params = {**run.model.params, part: {**run.model.params[part], name: value}}
    return dataclasses.replace(run, model=dataclasses.replace(run.model, params=params))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["another model", "the run's backbone", "a run", "what a run stands in"])
def test_other_models_and_runs_are_never_replaced(run: Run, lively_backbone: Path, tmp_path: Path, what: str):
    """A model directory holds no file that an export with its backbone has not a newer version of."""
    shutil.copytree(lively_backbone, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("32", "64"))
    (tmp_path / "around" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "around" / "run" / "config.json").write_text("{}")
    out = {"another model": tmp_path / "model", "the run's backbone": lively_backbone}.get(what, tmp_path / "around")
    out = out / "run" if what == "a run" else out
    before = contents(out)
    for export in (
        lambda: export_transformers(run, out, include_backbone=True),
        lambda: export_peft(run, out, ["user-1"]),
        lambda: export_backbone(run, out, "float32"),
    ):
        with pytest.raises(UserError, match="holds other files than an earlier export; choose another directory"):
            export()
    assert contents(out) == before


def test_nan_is_not_exported(run: Run, tmp_path: Path):
    bias = run.model.params["projector"]["bias"]
    damaged = with_params(run, "projector", "bias", jax.device_put(bias.at[0].set(jnp.nan), bias.sharding))
    for export in (
        lambda: export_transformers(damaged, tmp_path / "out", include_backbone=False),
        lambda: export_peft(damaged, tmp_path / "out", ["user-1"]),
    ):
        with pytest.raises(UserError, match="projector/bias holds NaN or infinity; export an earlier step"):
            export()
    embedding = run.model.params["backbone"]["embedding"]
    for value, words in [(jnp.nan, "holds NaN or infinity"), (1e6, "holds more than float16 can say")]:
        damaged = with_params(run, "backbone", "embedding", embedding.at[3, 0].set(value))
        with pytest.raises(UserError, match=f"embedding {words}"):
            export_backbone(damaged, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
