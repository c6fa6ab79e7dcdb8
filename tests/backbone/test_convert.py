"""HF -> Flax -> HF: the same bytes; the Flax form loads onto any mesh as the other does."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from helpers import hf_config, hf_model, load_backbone, mesh_of
from safetensors.torch import load_file, save_file

from e2p_jax.backbone.convert import convert
from e2p_jax.backbone.flax_checkpoint import FlaxCheckpoint
from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.backbone.weights import parameters
from e2p_jax.cli import main
from e2p_jax.errors import UserError

Values = dict[str, torch.Tensor]


def as_published_gpt2(values: Values) -> Values:
    """Names without `transformer.`, and causal masks among the tensors."""
    return {k.removeprefix("transformer."): v for k, v in values.items()} | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}


def head_saved_twice(values: Values) -> Values:
    return values | {"lm_head.weight": values["model.embed_tokens.weight"].clone()}


def mixed_dtypes(values: Values) -> Values:
    """Of one stacked parameter too: a layer's query matrix, or an expert's, in another dtype than the others'."""
    odd = "model.layers.1.self_attn.q_proj.weight"
    odd = odd if "model.layers.1.mlp.gate_proj.weight" in values else "model.layers.1.mlp.experts.2.up_proj.weight"
    mixed = {name: value if "norm" in name else value.to(torch.bfloat16) for name, value in values.items()}
    return mixed | {odd: values[odd].to(torch.float16)}


def further_layer() -> Values:
    """Of a layer behind the last one, which predicts later tokens; no parameter of ours."""
    return {f"model.layers.3.{name}": torch.full((2, 3), 0.5) for name in ("eh_proj.weight", "mlp.gate_proj.weight")}


SOURCES: dict[str, tuple[str, Callable[[Values], Values]]] = {
    "llama-mixed": ("llama", mixed_dtypes),
    "gemma-two-heads": ("gemma", head_saved_twice),
    "gpt2-bare": ("gpt2", as_published_gpt2),
    "deepseek-mixed": ("deepseek_v3", lambda values: mixed_dtypes(values | further_layer())),
    # One tensor for queries, keys and values, head by head, and what predicts later tokens.
    "qwen3-next": ("qwen3_next", lambda values: values | {"mtp.fc.weight": torch.ones(2, 3)}),
    "gemma3": ("gemma3", lambda values: values),  # an image encoder beside it
}


@pytest.fixture(scope="module", params=SOURCES)
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in shards, and its Flax form."""
    family, change = SOURCES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    hf_model(hf_config(family)).save_pretrained(folder / "hf", max_shard_size="20KB")
    shards = sorted((folder / "hf").glob("*.safetensors"))
    values = change({name: value for shard in shards for name, value in load_file(shard).items()})
    first = dict(list(values.items())[::2])
    index = {}
    for number, held in enumerate([first, {k: v for k, v in values.items() if k not in first}]):
        save_file(held, shards[number], metadata={"format": "pt"})
        index |= dict.fromkeys(held, shards[number].name)
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "hf" / "tokenizer.json").write_text("{}")
    convert(folder / "hf", folder / "flax", "org/model", "v1")
    return folder / "hf", folder / "flax"


def test_round_trip_is_byte_identical(forms: tuple[Path, Path], tmp_path: Path) -> None:
    source, flax = forms
    convert(flax, tmp_path / "back", str(flax), None)
    before, after = Checkpoint(source).tensors, Checkpoint(tmp_path / "back").tensors
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert after[name].tobytes() == tensor.tobytes(), name
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (flax / name).read_bytes() == (source / name).read_bytes()
    fingerprints = {Checkpoint(d).fingerprint() for d in (source, tmp_path / "back")}
    assert fingerprints == {FlaxCheckpoint(flax).fingerprint()}


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {}], ids=str)
def test_both_forms_load_alike_on_another_mesh(forms: tuple[Path, Path], axes: dict[str, int]) -> None:
    """It was saved from four devices along fsdp."""
    hf, flax = (parameters(load_backbone(form, mesh_of(**axes))) for form in forms)
    assert hf.keys() == flax.keys()
    for path, value in hf.items():
        assert flax[path].dtype == value.dtype
        assert flax[path].sharding.is_equivalent_to(value.sharding, value.ndim), path
        np.testing.assert_array_equal(flax[path], value)


def test_orbax_alone_reads_the_parameters(forms: tuple[Path, Path]) -> None:
    ours = load_backbone(forms[0])
    with ocp.PyTreeCheckpointer() as checkpointer:
        shardings = jax.tree.map(
            lambda _: ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
            dict(checkpointer.metadata(forms[1].absolute() / "params").item_metadata.tree),
        )
        read = checkpointer.restore(forms[1].absolute() / "params", restore_args=shardings)
    np.testing.assert_array_equal(read["layers"]["o"].astype(np.float32), ours.layers.o[...])
    assert not [path for path in forms[1].rglob("*") if "pickle" in path.name or path.suffix == ".pkl"]


def test_a_flax_checkpoint_knows_the_model_it_was_made_from(forms: tuple[Path, Path]) -> None:
    assert FlaxCheckpoint(forms[1]).name == ("org/model", "v1")


def test_command_goes_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_model(hf_config()).save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), "--out", str(tmp_path / "flax")]) == 0
    assert FlaxCheckpoint(tmp_path / "flax").name == (str(tmp_path / "hf"), None)
    assert main(["convert", str(tmp_path / "flax"), "--out", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "flax"), str(tmp_path / "back")]
    names = ("model.safetensors", "config.json")
    first, second = ([(tmp_path / form / name).stat().st_size for name in names] for form in ("hf", "back"))
    assert first[1] == second[1]

    (tmp_path / "flax" / "config.json").write_text(
        (tmp_path / "flax" / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 40')
    )
    with pytest.raises(UserError, match=r"disagree: layers/down has shape \(3, 32, 48\), config.json says"):
        load_backbone(tmp_path / "flax")
    manifest = tmp_path / "flax" / "flax.json"
    whole = json.loads(manifest.read_text())
    changes = [{"fingerprint": "f" * 63}, {"fingerprint": 5}, {"path": None}, {"revision": 5}, {"tensors": ["a"]}]
    damaged = [json.dumps(whole | change) for change in [*changes, {"tensors": {"a": "float33"}}]]
    for text in ("{}", "null", "[" * 100_000, *damaged):
        manifest.write_text(text)
        with pytest.raises(UserError, match=r"flax\.json: .*; run `e2p convert` again$"):
            FlaxCheckpoint(tmp_path / "flax")


def test_changed_parameters_do_not_pass_for_the_source(tmp_path: Path) -> None:
    for seed, name in enumerate(["one", "two"]):
        hf_model(hf_config(), seed).save_pretrained(tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}-flax", name, None)
    (tmp_path / "one-flax" / "params").rename(tmp_path / "away")
    with pytest.raises(UserError, match="not an Orbax checkpoint"):
        load_backbone(tmp_path / "one-flax")
    (tmp_path / "two-flax" / "params").rename(tmp_path / "one-flax" / "params")
    with pytest.raises(UserError, match="not those that `e2p convert` wrote"):
        convert(tmp_path / "one-flax", tmp_path / "back", "one", None)
    assert not (tmp_path / "back").exists()
