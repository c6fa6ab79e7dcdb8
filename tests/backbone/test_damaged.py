"""Hostile and damaged model files: one line that names the file, never a traceback, never other numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from e2p_jax.backbone.families import parse_config, read_config
from e2p_jax.errors import UserError
from e2p_jax.tensors import read_tensors

SOURCE = Path("some/config.json")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def f32(shape: Any, first: Any, last: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [first, last]}


def write(path: Path, header: str | bytes, data: bytes = bytes(16), length: int | None = None) -> Path:
    encoded = header.encode() if isinstance(header, str) else header
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


HEADERS: dict[str, str | bytes] = {
    "number": "5",
    "text": '"x"',
    "null": "null",
    "list": "[]",
    "deep": "[" * 100_000,
    "deep entry": '{"a": ' + "[" * 100_000,
    "constant": '{"a": NaN}',
    "utf-16": json.dumps({"a": f32([4], 0, 16)}).encode("utf-16"),
    "entry is a number": '{"a": 5}',
    "entry is null": '{"a": null}',
    "no dtype": '{"a": {"shape": [4], "data_offsets": [0, 16]}}',
    "dtype is a list": '{"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}',
    "unknown dtype": '{"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}}',
    "shape is text": '{"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}',
    "shape is an object": '{"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}, "b": {"dtype": "F32", '
    '"shape": [3], "data_offsets": [4, 16]}}',
    "negative shape": json.dumps({"a": f32([-1, -4], 0, 16)}),
    "fraction": json.dumps({"a": f32([4.0], 0, 16)}),
    "truth": json.dumps({"a": f32([True, 4], 0, 16)}),
    "huge": json.dumps({"a": f32([2**62, 2**62], 0, 16)}),
    "huge and empty": json.dumps({"a": f32([0, 2**70], 0, 0), "b": f32([4], 0, 16)}),
    "seventy axes": json.dumps({"a": f32([1] * 70 + [4], 0, 16)}),
    "negative offset": json.dumps({"a": f32([4], -16, 0)}),
    "into the header": json.dumps({"a": f32([8], -16, 16)}),
    "backwards": json.dumps({"a": f32([4], 16, 0)}),
    "one offset": '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}',
    "three offsets": '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}}',
    "overlap": json.dumps({"a": f32([3], 0, 12), "b": f32([3], 4, 16)}),
    "the same bytes": json.dumps({"a": f32([4], 0, 16), "b": f32([4], 0, 16)}),
    "a hole": json.dumps({"a": f32([1], 0, 4), "b": f32([2], 8, 16)}),
    "bytes left over": json.dumps({"a": f32([3], 0, 12)}),
    "beyond the file": json.dumps({"a": f32([5], 0, 20)}),
    "twice": '{"a": ENTRY, "a": ENTRY}'.replace("ENTRY", json.dumps(f32([4], 0, 16))),
    "half a surrogate": json.dumps({"\ud800": f32([4], 0, 16)}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_is_read_or_refused_in_a_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "model.safetensors", HEADERS[name])
    with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged safetensors") as error:
        read_tensors(path, "download it again")
    assert "\n" not in str(error.value) and str(error.value).endswith("; download it again")


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_is_said_to_be_longer_than_the_file(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "model.safetensors", json.dumps({"a": f32([4], 0, 16)}), length=length)
    with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged safetensors"):
        read_tensors(path, "download it again")


def test_what_the_format_allows_is_read(tmp_path: Path) -> None:
    """Empty tensors, scalars, any order of names, spaces after the header: as the library reads it."""
    rng = np.random.default_rng(0)
    given = {
        "b": rng.normal(size=(3, 5)).astype(np.float32),
        "a": np.zeros((0, 4), np.float16),
        "c": np.array(3.5),
        "d": rng.integers(0, 9, 7, dtype=np.int8),
    }
    save_file(given, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = read_tensors(tmp_path / "model.safetensors", "")
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as theirs:
        assert read.keys() == set(theirs.keys())
        for name, tensor in read.items():
            np.testing.assert_array_equal(tensor, theirs.get_tensor(name), strict=True)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings", "head_dim")
BAD = [0, -1, 1.5, 32.0, float("inf"), "32", [32], {"is": 32}, True, 10**9 * 4, 10**400]


@pytest.mark.parametrize("key", SIZES)
def test_a_size_is_a_whole_number_above_zero(key: str) -> None:
    for value in BAD:
        with pytest.raises(UserError, match=rf"some/config\.json: {key} is .*; it must be a whole number") as error:
            parse_config({**CONFIG, key: value}, SOURCE)
        assert len(str(error.value)) < 200, "a value of any length is cut short"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rms_norm_eps", [-1e-5, "1e-5", [1e-5], True, 10**400]),
        ("rope_theta", [0, -1.0, "10000", [1], True, float("inf"), 10**400]),
        ("tie_word_embeddings", [0, 1, "false", [], {}]),
        ("attention_bias", ["false", 0, []]),
        ("hidden_act", [["silu"], {}, 3, "", "relu"]),
        ("model_type", [None, ["llama"], {}, 3, "lama", "x" * 10_000]),
        ("rope_scaling", [3, "linear", [], {"rope_type": ["linear"]}, {"rope_type": "linear", "factor": 0}]),
        ("rope_scaling", [{"rope_type": "linear", "factor": value} for value in ("2", [2], -2, True, 10**400)]),
        ("rope_parameters", [3, [1], "x", {"rope_theta": "x"}, {"rope_theta": 1e4, "rope_type": None, "type": {}}]),
        ("num_attention_heads", [3]),
        ("attention_dropout", ["0", [0.0], 0.1]),
    ],
)
def test_any_other_value_is_of_its_type(key: str, values: list[Any]) -> None:
    parse_config(CONFIG, SOURCE)
    for value in values:
        with pytest.raises(UserError, match=r"some/config\.json: ") as error:
            parse_config({**CONFIG, key: value}, SOURCE)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        {**YARN, "rope_theta": 1.0},
        {**YARN, "truncate": 1},
        {**YARN, "beta_fast": 0},
        {**YARN, "original_max_position_embeddings": "64"},
        {**LLAMA3, "high_freq_factor": 1.0},
        {**LLAMA3, "low_freq_factor": 9.0},
    ],
)
def test_a_rope_that_cannot_be(rope: dict[str, Any]) -> None:
    parse_config({**CONFIG, "rope_parameters": YARN}, SOURCE)
    parse_config({**CONFIG, "rope_parameters": LLAMA3}, SOURCE)
    with pytest.raises(UserError, match=r"some/config\.json: .*rope kind"):
        parse_config({**CONFIG, "rope_parameters": rope}, SOURCE)


def test_more_parameters_than_any_model_has() -> None:
    sizes = {"hidden_size": 2**30, "intermediate_size": 2**30, "head_dim": 64}
    with pytest.raises(UserError, match=r"some/config\.json: describes a model of more than 1e\+15 parameters"):
        parse_config({**CONFIG, **sizes}, SOURCE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "malformed JSON"),
        ("null", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"a": ' * 100_000, "nested too deep"),
        ('{"vocab_size": NaN}', "NaN is no number"),
        ('{"hidden_size": 32, "hidden_size": 64}', "key 'hidden_size' stands twice"),
        (b"\xff\xfe{}", "codec can't decode"),
    ],
)
def test_config_json_is_an_object_or_refused_in_a_line(tmp_path: Path, text: str | bytes, reason: str) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=reason) as error:
        read_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in str(error.value)
