"""Every field of `config.json` is read as transformers reads it, or refused by name."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
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
from safetensors.numpy import load_file

from e2p_jax.backbone.families import FAMILIES, parse_config, read_config, significant
from e2p_jax.backbone.layout import DecoderConfig, layers_with, tensor_names
from e2p_jax.backbone.weights import abstract
from e2p_jax.errors import UserError

SOURCE = Path("some/config.json")
LINEAR = {"rope_type": "linear", "factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "layer_types": None, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_MSCALE = {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [2.0] * 8,
}
LONG_START = {"rope_parameters": LONG, "original_max_position_embeddings": 64}
NOPE_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "layer_types": None}
LOCAL = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 100.0}}

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
    *(("llama", {"rope_parameters": YARN}, "rope_parameters", {**YARN, key: value}, "logits")
      for key, value in [("factor", 2.0), ("original_max_position_embeddings", 32), ("attention_factor", 1.5),
                         ("beta_fast", 2.0), ("beta_slow", 0.2), ("truncate", False)]),
    *(("llama", {"rope_parameters": YARN_MSCALE}, "rope_parameters", {**YARN_MSCALE, key: value}, "logits")
      for key, value in [("mscale", 1.0), ("mscale_all_dim", 1.0)]),
    ("llama", {}, "rope_parameters", {**YARN, "original_max_position_embeddings": None}, "refused"),
    ("llama", {}, "rope_parameters", {**YARN, "beta": 1.0}, "refused"),
    ("llama", {}, "rope_parameters", {"rope_type": "proportional", "rope_theta": 10_000.0}, "refused"),
    ("llama", {}, "rope_parameters", {"rope_type": "linear", "rope_theta": 10_000.0}, "refused"),
    ("llama", {}, "rope_parameters", {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}, "refused"),
    ("llama", {}, "rope_parameters", {"full_attention": {"rope_theta": 10_000.0}}, "refused"),
    ("llama", {}, "rope_theta", 500_000.0, "refused"),  # contradicts rope_parameters
    ("llama", {"rope_theta": 10_000.0}, "rope_scaling", LINEAR, "refused"),  # contradicts rope_parameters
    ("llama", {}, "hidden_act", "gelu", "logits"),
    ("llama", {}, "hidden_act", "relu", "refused"),
    ("llama", {}, "attention_dropout", 0.1, "refused"),
    ("llama", {}, "rope_interleaved", True, "refused"),
    ("llama", {}, "is_decoder", True, "refused"),
    ("llama", {}, "add_cross_attention", True, "refused"),
    ("llama", {}, "is_encoder_decoder", True, "refused"),
    ("llama", {}, "sliding_window", 5, "refused"),  # transformers' Llama has none
    ("llama", {}, "quantization_config", {"quant_method": "aqlm"}, "refused"),
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
    ("qwen3", {}, "head_dim", 8, "shapes"),
    ("qwen3", {}, "attention_bias", True, "shapes"),
    ("qwen3", {}, "rms_norm_eps", 0.1, "logits"),
    ("qwen3", {"sliding_window": 5, "layer_types": None, "max_window_layers": 1}, "use_sliding_window", True, "logits"),
    ("qwen3", WINDOW, "sliding_window", 9, "logits"),
    ("qwen3", WINDOW, "max_window_layers", 2, "logits"),
    ("qwen3", WINDOW, "layer_types", ["sliding_attention", "full_attention", "full_attention"], "logits"),
    *(("phi3", {}, key, value, "shapes") for key, value in
      [("num_key_value_heads", 1), ("head_dim", 8), ("intermediate_size", 40), ("tie_word_embeddings", True)]),
    ("phi3", {}, "sliding_window", 5, "logits"),
    ("phi3", {}, "rope_parameters", {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}, "logits"),
    ("phi3", {}, "rope_parameters", {"rope_theta": 10_000.0, "partial_rotary_factor": 0.45}, "refused"),  # 7 of 16
    ("phi3", {}, "rope_parameters", {**LONG, "short_factor": [2.0]}, "refused"),
    ("phi3", {"rope_parameters": {"rope_theta": 10_000.0}}, "partial_rotary_factor", 0.5, "logits"),
    *(("phi3", LONG_START, "rope_parameters", {**LONG, key: value}, "logits")
      for key, value in [("short_factor", [4.0] * 8), ("attention_factor", 1.6), ("factor", 30.0)]),
    ("phi3", LONG_START, "original_max_position_embeddings", 128, "logits"),
    ("phi3", LONG_START, "original_max_position_embeddings", 128, "limit"),
    ("phi3", LONG_START, "max_position_embeddings", 1024, "logits"),
    ("phi3", {}, "resid_pdrop", 0.1, "refused"),
    ("phi3", {}, "embd_pdrop", 0.1, "refused"),
    ("smollm3", {}, "no_rope_layers", [0, 1, 1], "logits"),
    ("smollm3", {"no_rope_layers": None}, "no_rope_layer_interval", 3, "logits"),
    ("smollm3", {}, "no_rope_layers", [0, 1], "refused"),
    ("smollm3", {"sliding_window": 5, "layer_types": None}, "use_sliding_window", True, "logits"),
    ("smollm3", NOPE_WINDOW, "sliding_window", 9, "logits"),
    ("smollm3", NOPE_WINDOW, "no_rope_layers", [1, 1, 0], "logits"),
    ("smollm3", NOPE_WINDOW, "layer_types", ["sliding_attention", "full_attention", "full_attention"], "logits"),
    ("smollm3", {}, "tie_word_embeddings", False, "shapes"),
    ("smollm3", {}, "attention_bias", True, "shapes"),
    ("smollm3", {}, "mlp_bias", True, "shapes"),
    ("olmo2", {}, "num_key_value_heads", 1, "shapes"),
    ("olmo2", {}, "attention_bias", True, "shapes"),
    ("olmo2", {}, "rms_norm_eps", 0.1, "logits"),
    ("olmo2", {}, "clip_qkv", 8.0, "refused"),  # the first OLMo's
    ("gemma", {}, "head_dim", 8, "shapes"),
    ("gemma", {}, "hidden_size", 64, "logits"),  # the embeddings' factor
    ("gemma", {}, "tie_word_embeddings", False, "shapes"),
    ("gemma", {}, "rms_norm_eps", 0.1, "logits"),
    ("gemma", {}, "hidden_act", "silu", "logits"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act", "gelu", "logits"),  # meaning its tanh form
    ("gemma", {}, "hidden_activation", "gelu", "refused"),
    ("gemma", {}, "use_bidirectional_attention", True, "refused"),
    *((family, {}, key, value, "logits") for family in ("gemma2", "gemma3_text") for key, value in
      [("hidden_activation", "silu"), ("query_pre_attn_scalar", 32), ("final_logit_softcapping", 2.0),
       ("sliding_window", 9), ("layer_types", ["full_attention"] * 3)]),
    *((family, {}, key, value, "refused") for family in ("gemma2", "gemma3_text") for key, value in
      [("hidden_act", "silu"), ("use_bidirectional_attention", True), ("attention_dropout", 0.1)]),
    ("gemma2", {}, "final_logit_softcapping", None, "logits"),
    ("gemma2", {}, "attn_logit_softcapping", None, "logits"),
    ("gemma2", {}, "attn_logit_softcapping", 0.5, "logits"),
    ("gemma3_text", {}, "attn_logit_softcapping", 50.0, "refused"),  # transformers keeps it and caps nothing
    ("gemma3_text", {"layer_types": None}, "sliding_window_pattern", 3, "logits"),
    ("gemma3_text", {}, "rope_parameters", LOCAL, "logits"),
    ("gemma3_text", {}, "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}, "refused"),
    ("gemma3_text", {"rope_parameters": None}, "rope_theta", 100.0, "logits"),
    ("gemma3_text", {"rope_parameters": None}, "rope_local_base_freq", 100.0, "logits"),
    ("gemma3_text", {"rope_parameters": None}, "rope_scaling", LINEAR, "logits"),
    ("gemma3_text", {}, "rope_local_base_freq", 100.0, "refused"),  # contradicts rope_parameters
    *((family, {}, key, value, "shapes") for family in ("mixtral", "qwen3_moe") for key, value in
      [("num_local_experts", 5), ("num_key_value_heads", 1), ("tie_word_embeddings", True)]),
    *((family, {}, "num_experts_per_tok", 1, "logits") for family in ("mixtral", "qwen3_moe")),
    *((family, {}, "num_experts_per_tok", value, "refused") for family in ("mixtral", "qwen3_moe") for value in (0, 7)),
    ("mixtral", {}, "intermediate_size", 40, "shapes"),
    ("mixtral", {}, "sliding_window", 5, "logits"),
    ("mixtral", {}, "router_jitter_noise", 0.1, "refused"),
    ("mixtral", {}, "shared_intermediate_size", 48, "refused"),
    ("qwen3_moe", {}, "moe_intermediate_size", 40, "shapes"),
    ("qwen3_moe", {}, "num_experts", 5, "refused"),  # contradicts num_local_experts
    ("qwen3_moe", {}, "attention_bias", True, "shapes"),
    ("qwen3_moe", {}, "norm_topk_prob", True, "logits"),
    ("qwen3_moe", {"sliding_window": 5}, "use_sliding_window", True, "logits"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}, "sliding_window", 9, "logits"),
    ("qwen3_moe", {}, "decoder_sparse_step", 2, "shapes"),
    ("qwen3_moe", {}, "mlp_only_layers", [0], "shapes"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers", [0, 1, 2], "shapes"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "intermediate_size", 40, "shapes"),
    ("qwen3_moe", {}, "shared_expert_intermediate_size", 48, "refused"),
    ("qwen2_moe", {"sliding_window": 5, "layer_types": None}, "use_sliding_window", True, "logits"),
    ("qwen2_moe", {**WINDOW, "max_window_layers": 3}, "max_window_layers", 1, "logits"),
    *(("glm4_moe", {}, key, value, "shapes") for key, value in
      [("n_routed_experts", 9), ("n_shared_experts", 2), ("moe_intermediate_size", 40), ("intermediate_size", 40),
       ("first_k_dense_replace", 0), ("first_k_dense_replace", 3), ("attention_bias", True), ("use_qk_norm", True)]),
    *(("glm4_moe", {}, key, value, "refused") for key, value in
      [("n_group", 4), ("n_group", 6), ("topk_group", 1), ("topk_group", 4), ("n_shared_experts", 0)]),
    *(("deepseek_v3", {}, key, value, "shapes") for key, value in
      [("q_lora_rank", 20), ("q_lora_rank", None), ("kv_lora_rank", 12), ("v_head_dim", 20)]),
    ("deepseek_v3", {"qk_head_dim": None}, "qk_nope_head_dim", 16, "shapes"),
    *(("deepseek_v3", {}, key, value, "refused") for key, value in
      [("v_head_dim", 24), ("num_key_value_heads", 2), ("head_dim", 16), ("qk_head_dim", 24), ("topk_group", 4),
       ("scoring_func", "softmax"), ("topk_method", "greedy")]),
    ("deepseek_v2", {}, "norm_topk_prob", True, "refused"),
    ("glm4_moe_lite", {}, "mlp_layer_types", ["dense", "dense", "sparse"], "shapes"),
    ("glm4_moe_lite", {}, "mlp_layer_types", ["sparse", "dense", "sparse"], "refused"),
    ("glm4_moe_lite", {}, "first_k_dense_replace", 2, "refused"),
    *(("qwen3_5_text", {}, key, value, "shapes") for key, value in
      [("layer_types", ["full_attention", "linear_attention"]), ("linear_num_key_heads", 4), ("head_dim", 8),
       ("linear_num_value_heads", 2), ("linear_key_head_dim", 4), ("linear_value_head_dim", 8),
       ("linear_conv_kernel_dim", 3), ("attention_bias", True)]),
    ("qwen3_5_text", {"layer_types": None, "num_hidden_layers": 4}, "full_attention_interval", 2, "shapes"),
    *(("qwen3_5_text", {}, key, value, "refused") for key, value in
      [("layer_types", ["linear_attention"] * 2), ("layer_types", ["full_attention"] * 3), ("linear_num_key_heads", 3),
       ("attn_output_gate", False), ("mamba_ssm_dtype", "bfloat16"), ("output_gate_type", "sigmoid")]),
    *(("qwen3_5_moe_text", {}, key, value, "refused") for key, value in
      [("norm_topk_prob", False), ("mlp_only_layers", [0]), ("decoder_sparse_step", 2)]),
    ("exaone4", {"layer_types": None}, "sliding_window_pattern", 3, "logits"),
    ("gpt_oss", {}, "hidden_act", "gelu", "refused"),
    ("gpt_oss", {"experts_per_token": 3}, "experts_per_token", 2, "refused"),
    *(("gpt2", {}, key, value, "shapes") for key, value in
      [("vocab_size", 101), ("n_embd", 64), ("n_layer", 2), ("n_inner", 40), ("n_inner", None), ("n_positions", 128),
       ("tie_word_embeddings", False)]),
    ("gpt2", {}, "n_positions", 128, "limit"),
    ("gpt2", {}, "n_ctx", 128, "refused"),
    ("gpt2", {}, "n_head", 2, "logits"),
    ("gpt2", {}, "layer_norm_epsilon", 0.1, "logits"),
    ("gpt2", {}, "activation_function", "silu", "logits"),
    ("gpt2", {}, "activation_function", "relu", "refused"),
    ("gpt2", {}, "scale_attn_weights", False, "logits"),
    ("gpt2", {}, "scale_attn_by_inverse_layer_idx", True, "refused"),
    ("gpt2", {}, "add_cross_attention", True, "refused"),
]  # fmt: skip
# Bookkeeping, generation and initialisation: written by transformers, without effect on logits.
INERT = {
    *("architectures", "model_type", "dtype", "transformers_version", "use_cache", "initializer_range"),
    *("pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "classifier_dropout"),
}


def config_json(family: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """What transformers writes for a tiny model of the family, with keys changed or (None) set to null."""
    return json.loads(hf_config(family).to_json_string()) | (changes or {})


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape, as our decoder expects them."""
    state = nnx.to_flat_state(nnx.state(abstract(config, dtype=jnp.dtype("float32"))))
    ours = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in state}
    names = tensor_names(config)
    assert ours.keys() == names.keys()
    shapes: dict[str, tuple[int, ...]] = {}
    for path, template in names.items():
        axes = template.count("{}")
        held = layers_with(config, path.split("/")[-1])
        for index in np.ndindex(ours[path][:axes]):
            name = template.format(*(held[layer] for layer in index[:1]), *index[1:])
            shape = ours[path][axes:]
            shapes[name] = (shapes.get(name, (0,))[0] + shape[0], *shape[1:])
    return {name: shape[::-1] if config.transposed and ".h." in name else shape for name, shape in shapes.items()}


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, dict):
        return {key: other(inner) if key != "rope_type" else inner for key, inner in value.items()}
    if isinstance(value, list):
        return ["sliding_attention" if kind == "full_attention" else "full_attention" for kind in value] or [0]
    if isinstance(value, bool) or value is None:
        return not value
    return value * 2 + (value == 0) if isinstance(value, int | float) else f"{value}2"


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
        assert key in str(error.value) or (key == "rope_parameters" and "rope kind" in str(error.value))
        assert "\n" not in str(error.value)
    elif effect == "shapes":
        ours = tensor_shapes(parse_config(after, SOURCE))
        assert ours != tensor_shapes(parse_config(before, SOURCE))
        build(after).save_pretrained(tmp_path)  # in memory transformers fuses experts
        assert ours == {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    elif effect == "limit":
        assert parse_config(after, SOURCE).max_positions == value
    else:
        tokens = random_tokens(1, 40)
        theirs = build(after)
        reference = hf_logits(theirs, input_ids=tokens.astype(np.int64))
        assert np.abs(reference - hf_logits(build(before), input_ids=tokens.astype(np.int64))).max() > 0.01
        theirs.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(after))
        with jax.disable_jit():  # every case is another program: they share operations, and compiling takes longest
            ours = logits(load_backbone(tmp_path), *whole_rows(tokens))
        assert_close(ours, reference)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_writes_has_a_say_or_is_inert(family: str) -> None:
    """With another value the model is another one, or refused; `CASES` has which, for many."""
    written = config_json(family)
    tried = {key for case_family, _, key, _, _ in CASES if case_family in ("llama", family)}
    for key in written.keys() - INERT - FAMILIES[family].inert - tried:
        with contextlib.suppress(UserError):
            assert parse_config(written | {key: other(written[key])}, SOURCE) != parse_config(written, SOURCE), key
    changed = written | dict.fromkeys((INERT | FAMILIES[family].inert) - {"model_type"}, 7)
    assert parse_config(changed, SOURCE) == parse_config(written, SOURCE)


@pytest.mark.parametrize("key", ["attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn"])
def test_what_gpt2_calls_inert_is(key: str) -> None:
    """Dropout does nothing in evaluation mode; the other orders operations for half precision."""
    tokens = random_tokens(1, 20).astype(np.int64)
    before, after = (build(config_json("gpt2", change)) for change in ({}, {key: 0.5 if "pdrop" in key else True}))
    assert_close(hf_logits(after, input_ids=tokens), hf_logits(before, input_ids=tokens), 1e-6)


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
    "yarn": (
        {"rope_theta": 1e4, "rope_scaling": {key: YARN[key] for key in YARN if key != "rope_theta"}},
        {"rope_parameters": YARN},
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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma", "gemma2"])
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
    np.testing.assert_allclose(ours.ropes[0].frequencies, rotary.inv_freq.numpy(), rtol=1e-6)
    assert ours.ropes[0].scale == pytest.approx(rotary.attention_scaling)


def test_both_dialects_of_gemma3_and_phi3() -> None:
    """One rope for each kind of layer, and longrope under its older name."""
    common = config_json("gemma3_text", {"rope_parameters": None, "rope_theta": 5e5, "rope_local_base_freq": 2e4})
    old = parse_config(common | {"rope_scaling": LINEAR}, SOURCE)
    nested = {"full_attention": {**LINEAR, "rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
    assert old == parse_config(config_json("gemma3_text", {"rope_parameters": nested}), SOURCE)
    assert old == parse_config(common | {"rope_scaling": LINEAR, "rope_parameters": nested}, SOURCE)
    assert [len(old.ropes), old.layer_ropes] == [2, (1, 0, 1)]

    factors = {key: LONG[key] for key in ("short_factor", "long_factor")}
    new = parse_config(config_json("phi3", LONG_START), SOURCE)
    for kind in ("su", "longrope", "yarn"):
        changes = LONG_START | {"rope_parameters": None, "rope_scaling": {"type": kind, **factors}}
        assert parse_config(config_json("phi3", changes), SOURCE) == new


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_an_absent_key_means_what_transformers_takes(family: str) -> None:
    """The defaults differ between families: Mistral has a window of 4096 unless it is null."""
    values: dict[str, Any] = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}
    epsilon = "layer_norm_eps" if "layer_norm_eps" in config_json(family) else "rms_norm_eps"
    values |= {"num_attention_heads": 32, "model_type": family, epsilon: 1e-6, "hidden_size": 256}
    values |= {"num_hidden_layers": 30}
    heads = {"deepseek_v3": {"num_attention_heads": 128}, "glm4_moe_lite": {"num_attention_heads": 20}}
    values |= ({"deepseek_v2": {"num_experts_per_tok": 6}} | heads).get(family, {})
    for switched in (False, True):
        values |= {"use_sliding_window": True} if switched and "use_sliding_window" in config_json(family) else {}
        theirs = transformers.CONFIG_MAPPING[family].from_dict(dict(values))
        written = json.loads(theirs.to_json_string(use_diff=False))
        assert parse_config(values, SOURCE) == parse_config(written, SOURCE)
        assert len(written) > len(values) + 5


def test_both_names_of_the_number_of_experts() -> None:
    """Published files of Qwen3-MoE, and what transformers 5 writes."""
    written = config_json("qwen3_moe")
    published = {key: value for key, value in written.items() if key != "num_local_experts"} | {"num_experts": 6}
    assert written["num_local_experts"] == 6
    assert parse_config(published, SOURCE) == parse_config(written, SOURCE)


def test_an_absent_key_of_gpt2() -> None:
    values = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ours = parse_config(values | {"layer_norm_epsilon": 1e-5, "n_ctx": 64}, SOURCE)
    theirs = transformers.GPT2Config(**{key: values[key] for key in values if key != "model_type"})
    assert (ours.activation, theirs.activation_function) == ("gelu_tanh", "gelu_new")
    assert ours.intermediate_size == 4 * 32
    assert ours.tie_head == theirs.tie_word_embeddings


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps"])
def test_a_key_without_default_is_asked_for(key: str) -> None:
    values = config_json("llama")
    del values[key]
    with pytest.raises(UserError, match=rf"some/config\.json: key '{key}' is missing"):
        parse_config(values, SOURCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_significant_is_readable_and_means_the_same(family: str) -> None:
    """What a run keeps of its backbone's config.json; nulls that stand for something else than a default, too."""
    values = config_json(family)
    kept = json.loads(json.dumps(significant(values)))
    assert parse_config(kept, Path("backbone.json")) == parse_config(values, Path("config.json"))
    assert "transformers_version" not in kept


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'gpt_bigcode' is not supported; supported: arcee, .*, smollm3"):
        parse_config(config_json("llama") | {"model_type": "gpt_bigcode"}, SOURCE)
    with pytest.raises(UserError, match=r"'phimoe' is not supported \(it has its own .*\); supported: "):
        parse_config(config_json("llama") | {"model_type": "phimoe"}, SOURCE)
    for name in ("gemma3n", "gemma4"):
        with pytest.raises(UserError, match=rf"'{name}' is not supported \(its layers read .* in a slot has not"):
            parse_config({"model_type": name}, SOURCE)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: not found"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",\n "vocab_size"')
    with pytest.raises(UserError, match=r"config\.json: line 2: malformed JSON"):
        read_config(tmp_path)
