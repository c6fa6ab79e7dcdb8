"""Quantised checkpoints, each form held against what its own package, or transformers, makes of the same tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import hf_config, hf_model, load_backbone, mesh_of
from safetensors.numpy import save_file

from e2p_jax.backbone.lazy import Lazy
from e2p_jax.backbone.packed import METHODS, unpack
from e2p_jax.backbone.weights import open_checkpoint, parameters
from e2p_jax.cli import main
from e2p_jax.errors import UserError
from e2p_jax.tensors import read_tensors

HERE = Path(__file__).parent / "quantised"
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "group_size": 32}
BNB: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def settings_of(name: str) -> dict[str, Any]:
    kind, _, rest = name.partition("-")
    if kind == "ct":
        forms = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
        form = "pack-quantized" if rest == "int8-rows" else forms.get(rest.split("-")[0], "nvfp4-pack-quantized")
        return {"quant_method": "compressed-tensors", "format": form}
    return GPTQ | {"bits": int(rest[0])} if kind == "gptq" else {"awq": AWQ, "bnb": BNB}[kind]


@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("*.safetensors")))
def test_a_weight_is_what_the_forms_own_package_unpacks(name: str) -> None:
    """Made by `quantised/make.py`. Whole, and a few rows and columns of it; nothing else is left of the tensors."""
    stored = read_tensors(HERE / f"{name}.safetensors", "")
    reference = stored.pop("reference")
    stored |= {"m.input_scale": np.ones(1, np.float32), "other.weight": np.ones((3, 4), np.float32)}
    found = unpack(stored, settings_of(name), HERE / "config.json")
    assert found.keys() == {"m.weight", "other.weight"} and found["other.weight"] is stored["other.weight"]
    weight = found["m.weight"]
    assert isinstance(weight, Lazy) and weight.shape == reference.shape
    loose = {"bnb-int8": 1e-3, "ct-nvfp4": 4e-3}.get(name, 2e-6)  # theirs are float16 and bfloat16
    np.testing.assert_allclose(np.asarray(weight), reference, rtol=loose, atol=loose * np.abs(reference).max())
    part = np.empty((6, 40), np.float32)
    weight[3:30].read(part, (slice(2, 8), slice(10, 50)))
    np.testing.assert_array_equal(part, np.asarray(weight)[5:11, 10:50])


def test_gptq_without_groups_named_or_in_its_second_form() -> None:
    stored = read_tensors(HERE / "gptq-4.safetensors", "")
    plain = np.asarray(unpack(stored, settings_of("gptq-4"), HERE)["m.weight"])
    del stored["m.g_idx"]
    np.testing.assert_array_equal(np.asarray(unpack(stored, settings_of("gptq-4"), HERE)["m.weight"]), plain)
    zeros = stored["m.qzeros"].view(np.uint32)
    more = sum(((zeros >> shift & 15) + 1 & 15) << shift for shift in range(0, 32, 4))
    stored["m.qzeros"] = np.asarray(more, np.uint32).view(np.int32)
    second = settings_of("gptq-4") | {"checkpoint_format": "gptq_v2"}
    np.testing.assert_array_equal(np.asarray(unpack(stored, second, HERE)["m.weight"]), plain)


@pytest.mark.parametrize("block", [(128, 128), (16, 32), None])
def test_fp8_with_scales_for_blocks_is_as_transformers_reads_it(block: tuple[int, int] | None) -> None:
    """DeepSeek's and Qwen's form; and weights that are no whole blocks, which transformers refuses."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(256, 384)).astype(ml_dtypes.float8_e4m3fn)
    shape = (256 // block[0], 384 // block[1]) if block else ()
    scale = rng.random(shape, dtype=np.float32) + np.float32(0.1)
    stored = {
        "m.weight": weight,
        "m.weight_scale_inv": np.asarray(scale),
        "m.activation_scale": np.ones((), np.float32),
    }
    settings = {"quant_method": "fp8", "weight_block_size": list(block) if block else None}
    found = unpack(stored, settings, HERE)
    assert found.keys() == {"m.weight"}
    quantised = torch.tensor(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    reference = Fp8Dequantize(None).convert(
        {"weight": quantised, "weight_scale_inv": torch.tensor(scale.reshape(shape or (1, 1)))}
    )
    np.testing.assert_array_equal(np.asarray(found["m.weight"]), reference["weight"].numpy())
    if block:
        cut = {**stored, "m.weight": np.ascontiguousarray(weight[:250, :380])}
        np.testing.assert_array_equal(
            np.asarray(unpack(cut, settings, HERE)["m.weight"]), reference["weight"].numpy()[:250, :380]
        )


def test_mxfp4_experts_are_as_transformers_reads_them() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 12, 2, 16), np.uint8)
    scales = rng.integers(110, 135, (3, 12, 2), np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = unpack({f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"}, HERE)
    reference = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    assert found.keys() == {name}
    np.testing.assert_array_equal(np.asarray(found[name]), reference.numpy())


def test_gpt_oss_as_published_is_the_model_that_its_mxfp4_stands_for(tmp_path: Path) -> None:
    """Loaded, and as `e2p convert` writes it plainly; whole matrices of experts in a place of their own."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = hf_model(hf_config("gpt_oss", hidden_size=64, intermediate_size=32, num_hidden_layers=2))
    theirs.save_pretrained(tmp_path / "plain")
    tensors = read_tensors(tmp_path / "plain" / "model.safetensors", "")
    published, rng = dict(tensors), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, out = published.pop(name).shape
        blocks = rng.integers(0, 256, (experts, out, width // 32, 16), np.uint8)
        scales = rng.integers(122, 126, blocks.shape[:3], np.uint8)
        published |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        whole = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
        tensors[name] = whole.contiguous().numpy()
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tmp_path / "plain", tmp_path / "published")
    save_file(published, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    ours, plain = (parameters(load_backbone(tmp_path / at, mesh_of(fsdp=4))) for at in ("published", "plain"))
    for path, value in plain.items():
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(value))
    gate = tensors["model.layers.1.mlp.experts.gate_up_proj"][:, :, ::2].swapaxes(1, 2)
    np.testing.assert_array_equal(np.asarray(ours["layers/expert_gate"])[1], gate)
    arguments = ["convert", str(tmp_path / "published"), "--out", str(tmp_path / "written"), "--dtype", "float32"]
    assert main(arguments) == 0
    written = read_tensors(tmp_path / "written" / "model.safetensors", "")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value)


def quantised_model(directory: Path, family: str) -> dict[str, np.ndarray]:
    """A model whose matrices are FP8 but for one, with a scale a row, or a block of 16 x 16 as DeepSeek has them (of
    128 x 128); returns the tensors that they stand for.
    """
    hf_model(hf_config(family)).save_pretrained(directory)
    tensors = read_tensors(directory / "model.safetensors", "")
    expected, blocks = dict(tensors), family == "deepseek_v3"
    for name in [name for name in tensors if "proj" in name and ".0.self_attn.o_proj" not in name]:
        if not name.endswith("weight"):
            continue
        rows, columns = (np.arange(size) // 16 for size in tensors[name].shape)
        scale, spread = np.abs(tensors[name]).max(axis=1, keepdims=True) / np.float32(448), (slice(None), slice(None))
        if blocks:
            scale = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
            np.maximum.at(scale, np.ix_(rows, columns), np.abs(tensors[name]) / np.float32(448))
            spread = np.ix_(rows, columns)
        tensors[name] = (tensors[name] / scale[spread]).astype(ml_dtypes.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale_inv" if blocks else ".weight_scale")] = scale
        expected[name] = tensors[name].astype(np.float32) * scale[spread]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    of_rows = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    of_blocks = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    config["quantization_config"] = of_blocks if blocks else of_rows
    (directory / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_quantised_directory_loads_onto_a_mesh_and_converts_to_a_plain_one(tmp_path: Path, family: str) -> None:
    expected = quantised_model(tmp_path / "fp8", family)
    held = open_checkpoint(tmp_path / "fp8").tensors
    assert held.keys() == expected.keys()
    assert main(["convert", str(tmp_path / "fp8"), "--out", str(tmp_path / "plain"), "--dtype", "float32"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    written = read_tensors(tmp_path / "plain" / "model.safetensors", "")
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value)
    ours, plain = (parameters(load_backbone(tmp_path / place, mesh_of(fsdp=4))) for place in ("fp8", "plain"))
    for name, value in plain.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(value))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quant_method": "aqlm"}, "'aqlm' cannot be read; take the model unquantised, as GGUF, or by one of .*'awq'"),
        ({}, "None cannot be read"),
        ({**AWQ, "version": "gemv"}, "'awq' with bits=4, version='gemv'"),
        ({**GPTQ, "bits": 3}, "'gptq' with bits=3"),
        ({**GPTQ, "bits": 4, "checkpoint_format": "marlin"}, "'gptq' with .*'marlin'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'compressed-tensors' with format='marlin-24'"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}},
            ".* with a sparsity_config",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}},
            ".* with a transform_config",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt' with quant_algo='NVFP4'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=f"config.json: quantization_config: weights quantised by {what}") as caught:
        unpack({"m.weight": np.ones(3)}, settings, HERE / "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["awq", "gptq-4", "bnb-nf4", "ct-int4"])
def test_parts_that_do_not_belong_together_are_named(name: str) -> None:
    whole = read_tensors(HERE / f"{name}.safetensors", "")
    del whole["reference"]
    kind = METHODS[settings_of(name)["quant_method"]][0]
    needed = next(part for part in kind.parts if part != ".weight" and not part.startswith("?"))
    with pytest.raises(UserError, match=rf"quantised: m{kind.key} has no m{needed} beside it; download it again"):
        unpack({n: t for n, t in whole.items() if needed not in n}, settings_of(name), HERE / "config.json")
