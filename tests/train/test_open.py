"""What of a run is read when only its projector is asked."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from e2p_jax.backbone import tensor_files as files
from e2p_jax.cli import main
from e2p_jax.config import BackboneConfig, Config, DataConfig, PrefixConfig
from e2p_jax.errors import UserError
from e2p_jax.prefix import mlp
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.run import claim_run, open_run
from e2p_jax.train.setup import build_model, frozen_model, initial_state, read_inputs
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import save_table

HIDDEN = 24  # no other array has this size


@pytest.fixture(scope="module")
def run(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begun, and saved at step 0."""
    folder = tmp_path_factory.mktemp("open")
    vectors = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    save_table(folder / "table", [f"user-{n}" for n in range(5)], vectors, name="made", version="1")
    config = Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(embeddings=str(folder / "table"), seq_len=128),
        prefix=PrefixConfig("after_bos"),
        projector=mlp.Settings(hidden_size=HIDDEN),
    ).resolved()
    inputs = read_inputs(config)
    model = build_model(inputs, Population.of(vectors))
    claim_run(epath.Path(folder / "run"), config, inputs, model)
    state, frozen = initial_state(model, config.train)
    checkpoints = Checkpoints(folder / "run", config.train)
    checkpoints.save(state, frozen["projector"], {}, None)
    checkpoints.close()
    return folder / "run"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is copied out of the backbone's files, by the reader that does it."""
    shapes: list[tuple[int, ...]] = []
    reader = files._slice

    def counted(tensors: list[np.ndarray], *args: Any) -> np.ndarray:
        shapes.extend(tensor.shape for tensor in tensors)
        return reader(tensors, *args)

    monkeypatch.setattr(files, "_slice", counted)
    return shapes


COMMANDS = {
    "prefixes": (["prefixes"], True),
    "peft": (["export", "--format", "peft", "--user", "user-3"], True),
    "transformers": (["export", "--format", "transformers"], False),
    "sglang": (["export", "--format", "sglang", "--user", "user-3", "--prompt", "hi"], True),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_of_the_backbone_only_token_embeddings_are_read_and_only_where_they_are_written(
    what: str, run: Path, tmp_path: Path, read: list[tuple[int, ...]]
) -> None:
    (command, *options), tokens = COMMANDS[what]
    assert main([command, str(run), "--out", str(tmp_path / "out"), *options]) == 0
    decoder = open_run(run, backbone="none").inputs.decoder
    assert set(read) == ({(decoder.vocab_size, decoder.hidden_size)} if tokens else set())


@pytest.mark.parametrize("backbone", ["none", "all"])
def test_no_moments_are_allocated(run: Path, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[int] = []
    gc.collect()  # what earlier tests had
    restore = Checkpoints.restore

    def counted(*args: Any) -> Any:
        found = restore(*args)
        there.append(sum(array.shape == (6, HIDDEN) for array in jax.live_arrays()))
        return found

    monkeypatch.setattr(Checkpoints, "restore", counted)
    model = open_run(run, backbone=backbone).model
    assert there == [1]  # the checkpoint's matrix, and neither a random one nor a moment of it
    assert isinstance(model.params["projector"]["up"], jax.Array)


def test_a_part_is_the_part_of_the_whole(run: Path) -> None:
    whole, part = (open_run(run, backbone=backbone).model for backbone in ("all", "embedding"))
    for name, value in whole.params["projector"].items():
        assert np.array_equal(part.params["projector"][name], value), name
    assert np.array_equal(part.params["backbone"]["embedding"], whole.params["backbone"]["embedding"])
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), whole.params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), part.params) == shapes
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(part.params["backbone"]["layers"]))


def test_random_token_embeddings_are_those_that_were_trained_in_front_of(run: Path) -> None:
    inputs = open_run(run, backbone="none").inputs
    config = dataclasses.replace(inputs.config, backbone=dataclasses.replace(inputs.config.backbone, weights="random"))
    inputs = dataclasses.replace(inputs, config=config)
    whole, part = frozen_model(inputs, 6, "all"), frozen_model(inputs, 6, "embedding")
    assert np.array_equal(part.params["backbone"]["embedding"], whole.params["backbone"]["embedding"])
    assert part.fingerprint == "random"


@pytest.mark.parametrize("backbone", ["none", "embedding"])
def test_another_backbone_is_refused_all_the_same(
    run: Path, tiny_backbone: Path, tmp_path: Path, backbone: Any
) -> None:
    place, weights = tmp_path / "backbone", tmp_path / "backbone" / "model.safetensors"
    shutil.copytree(tiny_backbone, place)
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["backbone"]["path"] = str(place)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(UserError, match="was trained in front of other weights"):
        open_run(tmp_path / "run", backbone=backbone)
