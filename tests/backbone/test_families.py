"""Every field of `config.json` is read as transformers reads it, or refused by name."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from helpers import (
    LLAMA3,
    SIZES,
    assert_close,
    hf_config,
    hf_logits,
    hf_model,
    load_backbone,
    logits,
    random_tokens,
    whole_rows,
)

from e2p_jax.backbone.families import DecoderConfig, parse_config, read_config, rope_frequencies, tensor_names
from e2p_jax.backbone.weights import abstract
from e2p_jax.errors import UserError

SOURCE = Path("some/config.json")
LINEAR = {"rope_type": "linear", "factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "layer_types": None, "max_window_layers": 1}

# (family, settings to start from, key, new value, what the change must do)
CASES: list[tuple[str, dict[str, Any], str, Any, str]] = [
    ("llama", {}, "vocab_size", 101, "shapes"),
    ("llama", {}, "hidden_size", 64, "shapes"),
    ("llama", {}, "intermediate_size", 40, "shapes"),
    ("llama", {}, "num_hidden_layers", 2, "shapes"),
    ("llama", {}, "num_attention_heads", 2, "shapes"),
    ("llama", {}, "num_key_value_heads", 1, "shapes"),
    ("llama", {}, "head_dim", 8, "shapes"),
    ("llama", {}, "tie_word_embeddings", True, "shapes"),
    ("llama", {}, "attention_bias", True, "shapes"),
    ("llama", {}, "mlp_bias", True, "shapes"),
    ("llama", {}, "max_position_embeddings", 128, "limit"),
    ("llama", {}, "rms_norm_eps", 0.1, "logits"),
    ("llama", {"rope_parameters": None}, "rope_theta", 100.0, "logits"),
    ("llama", {"rope_parameters": None}, "rope_scaling", LINEAR, "logits"),
    ("llama", {}, "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}, "logits"),
    ("llama", {}, "rope_parameters", {**LINEAR, "rope_theta": 10_000.0}, "logits"),
    *(("llama", {"rope_parameters": LLAMA3}, "rope_parameters", {**LLAMA3, key: value}, "logits")
      for key, value in [("factor", 2.0), ("low_freq_factor", 0.3), ("high_freq_factor", 9.0),
                         ("original_max_position_embeddings", 90), ("rope_theta", 500.0)]),
    ("llama", {}, "rope_parameters", {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}, "refused"),
    ("llama", {}, "rope_parameters", {"rope_type": "linear", "rope_theta": 10_000.0}, "refused"),
    ("llama", {}, "rope_parameters", {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}, "refused"),
    ("llama", {}, "rope_parameters", {"full_attention": {"rope_theta": 10_000.0}}, "refused"),
    ("llama", {}, "rope_theta", 500_000.0, "refused"),  # contradicts rope_parameters
    ("llama", {"rope_theta": 10_000.0}, "rope_scaling", LINEAR, "refused"),  # contradicts rope_parameters
    ("llama", {}, "hidden_act", "gelu", "refused"),
    ("llama", {}, "attention_dropout", 0.1, "refused"),
    ("llama", {}, "rope_interleaved", True, "refused"),
    ("llama", {}, "is_decoder", True, "refused"),
    ("llama", {}, "add_cross_attention", True, "refused"),
    ("llama", {}, "is_encoder_decoder", True, "refused"),
    ("llama", {}, "sliding_window", 5, "refused"),  # transformers' Llama has none
    ("llama", {}, "quantization_config", {"quant_method": "fp8"}, "refused"),
    ("llama", {}, "num_attention_heads", 3, "refused"),  # two key heads cannot be shared by three
    ("mistral", {"sliding_window": None}, "sliding_window", 5, "logits"),
    ("mistral", {}, "sliding_window", 5, "logits"),
    ("mistral", {}, "attention_bias", True, "refused"),
    ("qwen2", {"sliding_window": 5, "layer_types": None, "max_window_layers": 1}, "use_sliding_window", True, "logits"),
    ("qwen2", WINDOW, "sliding_window", 9, "logits"),
    ("qwen2", WINDOW, "max_window_layers", 2, "logits"),
    ("qwen2", WINDOW, "layer_types", ["sliding_attention", "full_attention", "full_attention"], "logits"),
    ("qwen2", WINDOW, "layer_types", ["chunked_attention"] * 3, "refused"),
    ("qwen2", {}, "layer_types", ["sliding_attention"] * 3, "refused"),  # without a window
    ("qwen2", WINDOW, "layer_types", ["full_attention"] * 2, "refused"),  # for three layers
    ("qwen2", {}, "use_mrope", True, "refused"),
]  # fmt: skip
# Bookkeeping, generation and initialisation: written by transformers, without effect on logits.
INERT = {
    *("architectures", "model_type", "dtype", "transformers_version", "use_cache", "initializer_range"),
    *("pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def config_json(family: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """What transformers writes for a tiny model of the family, with keys changed or (None) set to null."""
    return json.loads(hf_config(family).to_json_string()) | (changes or {})


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape, as our decoder expects them."""
    shapes = {}
    names = tensor_names(config)
    for path, leaf in nnx.to_flat_state(nnx.state(abstract(config, dtype=jnp.dtype("float32"), remat=False))):
        template, shape = names["/".join(map(str, path))], leaf.get_value().shape
        stacked = "{}" in template
        shapes |= {template.format(i): shape[stacked:] for i in range(config.num_layers if stacked else 1)}
    return shapes


def build(values: dict[str, Any]) -> Any:
    cls = transformers.CONFIG_MAPPING[values["model_type"]]
    return hf_model(cls.from_dict(json.loads(json.dumps(values))))


@pytest.mark.parametrize(
    ("family", "start", "key", "value", "effect"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_no_field_is_silently_unread(
    tmp_path: Path, family: str, start: dict[str, Any], key: str, value: Any, effect: str
) -> None:
    before = config_json(family, start)
    after = before | {key: value}
    assert before.get(key) != value
    if effect == "refused":
        parse_config(before, SOURCE)
        with pytest.raises(UserError, match=r"^some/config\.json: .*") as error:
            parse_config(after, SOURCE)
        assert ("rope kind" if key == "rope_parameters" else key) in str(error.value)
        assert "\n" not in str(error.value)
    elif effect == "shapes":
        ours = tensor_shapes(parse_config(after, SOURCE))
        assert ours != tensor_shapes(parse_config(before, SOURCE))
        assert ours == {name: tuple(tensor.shape) for name, tensor in build(after).named_parameters()}
    elif effect == "limit":
        assert parse_config(after, SOURCE).max_positions == value
    else:
        tokens = random_tokens(1, 40)
        theirs = build(after)
        reference = hf_logits(theirs, input_ids=tokens.astype(np.int64))
        assert np.abs(reference - hf_logits(build(before), input_ids=tokens.astype(np.int64))).max() > 0.01
        theirs.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(after))
        assert_close(logits(load_backbone(tmp_path), *whole_rows(tokens)), reference)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_every_key_that_transformers_writes_is_tried_above_or_inert(family: str) -> None:
    written = config_json(family)
    tried = {key for case_family, _, key, _, _ in CASES if case_family in ("llama", family)}
    assert written.keys() - INERT <= tried
    changed = written | dict.fromkeys(INERT - {"model_type"}, 7)
    assert parse_config(changed, SOURCE) == parse_config(written, SOURCE)


LLAMA3_4 = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
DIALECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta": ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "neither": ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "null scaling": ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5}}),
    "type": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}},
    ),
    "rope_type": (
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", **LLAMA3_4}},
        {"rope_parameters": LLAMA3},
    ),
    "both spellings": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3_4}},
        {"rope_parameters": LLAMA3},
    ),
    "both dialects": (
        {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 5e5}},
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}},
    ),
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("name", DIALECTS)
def test_both_dialects_mean_the_same(family: str, name: str) -> None:
    common = config_json(family)
    common.pop("rope_parameters")
    old, new = (common | dialect for dialect in DIALECTS[name])
    ours = parse_config(old, SOURCE)
    assert ours == parse_config(new, SOURCE)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig.from_dict(json.loads(json.dumps(old | {"model_type": "llama", "layer_types": None})))
    )
    np.testing.assert_allclose(rope_frequencies(ours.rope, ours.head_dim), rotary.inv_freq.numpy(), rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_an_absent_key_means_what_transformers_takes(family: str) -> None:
    """The defaults differ between families: Mistral has a window of 4096 unless it is null."""
    values: dict[str, Any] = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}
    values |= {"num_attention_heads": 32, "model_type": family, "rms_norm_eps": 1e-6, "use_sliding_window": True}
    values |= {"num_hidden_layers": 30}
    if family != "qwen2":
        values.pop("use_sliding_window")
    ours, theirs = parse_config(values, SOURCE), transformers.CONFIG_MAPPING[family].from_dict(dict(values))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == values["hidden_size"] // 32
    assert ours.tie_head == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    sliding = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 30
    window = getattr(theirs, "sliding_window", None) or 0
    assert ours.windows == tuple(window if kind == "sliding_attention" else 0 for kind in sliding)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps"])
def test_a_key_without_default_is_asked_for(key: str) -> None:
    values = config_json("llama")
    del values[key]
    with pytest.raises(UserError, match=rf"some/config\.json: key '{key}' is missing"):
        parse_config(values, SOURCE)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'gpt_bigcode' is not supported; supported: \['llama', 'mistral', 'qwen2'\]"):
        parse_config(config_json("llama") | {"model_type": "gpt_bigcode"}, SOURCE)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: not found"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",\n "vocab_size"')
    with pytest.raises(UserError, match=r"config\.json: line 2: malformed JSON"):
        read_config(tmp_path)
