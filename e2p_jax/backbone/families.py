"""Hugging Face model families as data: `config.json` -> `DecoderConfig`.

Every key of a `config.json` is either read here, checked to say what the decoder does anyway, or listed as inert. Any
other key is an error: a rope setting that nobody reads is the field's classic silent failure.
A family is an entry of `FAMILIES`: what its keys are read by, and the flags of the decoder that they leave open.
"""

import dataclasses
import functools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from e2p_jax.backbone import config_layers as layers
from e2p_jax.backbone import config_rules as rules
from e2p_jax.backbone.config_reader import INERT, INERT_STARTS, Read, Reader, short
from e2p_jax.backbone.layout import DecoderConfig, layer_shapes, layers_with
from e2p_jax.backbone.packed import check_method
from e2p_jax.errors import UserError
from e2p_jax.json_files import read_object

_MOST_PARAMETERS = 10**15  # far beyond any model


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type`, and how its `config.json` is read."""

    readers: tuple[Read, ...]
    """In order; each may use what the ones before have read."""
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `DecoderConfig` that are the same in all models of the family."""
    absent: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What transformers assumes where `config.json` lacks the key; null is not the same as absent."""
    inert: frozenset[str] = frozenset()
    """Keys without effect on a frozen forward pass, beside those of all families."""
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys that may only say what the family does anyway, beside those of all families."""


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A `model_type` whose `text_config` is the language model's; its other models are left alone."""

    families: tuple[str, ...]
    """The `model_type`s of the language model; the first where it says none."""
    absent: dict[str, Any]
    """What transformers assumes where `text_config` lacks the key, beside what the family does."""
    inert: frozenset[str]


# What most families read first.
_SIZES = (rules.sizes, rules.hidden_act)
_USUAL = (*_SIZES, layers.plain_rope)
# Those with LayerNorm.
_LAYER_NORM = (functools.partial(rules.sizes, epsilon="layer_norm_eps", head_key=None), rules.hidden_act)

_GEMMA_READ = (rules.attention_bias, rules.gemma_embedding)
_GEMMA_SIZES = (rules.sizes, rules.hidden_activation, rules.query_scalar)
_GEMMA = {"norm": "rms_one_plus"}
_SANDWICH = {"post_norms": True, "naming": "sandwich"}
_GEMMA_ABSENT = {"tie_word_embeddings": True, "head_dim": 256}
# Training's: the loss that balances experts.
_ROUTER = frozenset({"router_aux_loss_coef", "output_router_logits"})
_LATENTS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_DEEPSEEK = frozenset({"ep_size", "aux_loss_alpha", "seq_aux"})  # of training
_LATENT_SIZES = (functools.partial(rules.sizes, head_key="qk_rope_head_dim"), rules.hidden_act)
# Qwen3-Next and those after it: linear attention, and beside it attention with a gate.
_HYBRID_READ = (rules.hidden_act, layers.partial_rope, layers.linear_layers, rules.attention_bias, rules.linear_heads)
_HYBRID = {"norm": "rms_one_plus", "qk_norm": "head", "gated_attention": True}
_HYBRID_ABSENT = {"head_dim": 256, "partial_rotary_factor": 0.25, "full_attention_interval": 4}
_HYBRID_ABSENT |= {f"linear_{kind}_head_dim": 128 for kind in ("key", "value")}
_HYBRID_ABSENT |= {"linear_conv_kernel_dim": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32}
_HYBRID_INERT = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})  # layers left alone in the files
_HYBRID_OWN = {"attn_output_gate": True, "output_gate_type": "swish", "mamba_ssm_dtype": "float32"}
_QWEN_ABSENT = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family((*_USUAL, layers.unlimited, rules.attention_bias, rules.mlp_bias)),
    "mistral": Family((*_USUAL, layers.one_window), absent={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family((*_USUAL, layers.late_windows), {"qkv_bias": True}, _QWEN_ABSENT),
    "qwen3": Family(
        (*_USUAL, layers.late_windows, rules.attention_bias), {"qk_norm": "head"}, _QWEN_ABSENT | {"head_dim": 128}
    ),
    "phi3": Family(
        (*_SIZES, layers.phi3_rope, layers.one_window),
        {"naming": "fused"},
        {"original_max_position_embeddings": 4096},
        frozenset({"full_attn_mod", "interpolate_factor"}),  # of Phi-4-mini; its own code does not read them either
    ),
    "smollm3": Family(
        (*_SIZES, layers.smollm3_rope, layers.nope_windows, rules.attention_bias, rules.mlp_bias),
        absent={"num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        inert=frozenset({"max_window_layers"}),  # Qwen's, left in SmolLM3-3B
    ),
    "olmo2": Family(
        (*_USUAL, layers.unlimited, rules.attention_bias),
        _SANDWICH | {"pre_norms": False, "norm": "rms_float32", "qk_norm": "all"},
    ),
    "olmo3": Family(
        (*_SIZES, layers.windows_but_every_fourth, layers.olmo3_ropes, rules.attention_bias),
        _SANDWICH | {"pre_norms": False, "norm": "rms_float32", "qk_norm": "all"},
        {"sliding_window": 4096},
    ),
    "ministral3": Family(
        (*_SIZES, layers.ministral3_rope, layers.one_window),
        absent={"num_key_value_heads": 8, "head_dim": 128},
    ),
    "granite": Family(
        (*_USUAL, layers.unlimited, rules.attention_bias, rules.mlp_bias, rules.granite_factors),
        absent=dict.fromkeys(
            ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0
        ),
    ),
    "glm4": Family(
        (*_SIZES, layers.partial_rope, layers.unlimited, rules.qkv_bias),
        {"post_norms": True, "interleaved": True, "naming": "glm4"},
        {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "exaone4": Family(
        (*_SIZES, layers.exaone4_windows, functools.partial(layers.window_ropes, unless_none=True)),
        _SANDWICH | {"pre_norms": False, "qk_norm": "head"},
        {"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "seed_oss": Family(
        (*_USUAL, layers.unlimited, rules.qkv_bias, rules.output_bias, rules.mlp_bias),
        absent={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
        inert=frozenset({"attention_dropout", "residual_dropout"}),  # 0.1 as published: of its own training
    ),
    "hunyuan_v1_dense": Family(
        (*_SIZES, layers.hunyuan_rope, layers.unlimited, rules.attention_bias),
        {"qk_norm": "rotated", "naming": "hunyuan"},
        inert=frozenset({"eod_token_id", "cla_share_factor"}),
        own={"add_classification_head": False, "use_cla": False, "use_rotary_pos_emb": True},
    ),
    "arcee": Family(
        (*_USUAL, layers.unlimited, rules.attention_bias, rules.mlp_bias), {"gated": False}, {"hidden_act": "relu2"}
    ),
    "cohere2": Family(
        (*_LAYER_NORM, layers.gemma3_windows, layers.window_ropes, rules.attention_bias, rules.logit_scale),
        {"norm": "layer_unbiased", "parallel": True, "shared_norm": True, "interleaved": True},
        {"tie_word_embeddings": True, "sliding_window": 4096, "sliding_window_pattern": 4, "logit_scale": 0.0625},
        frozenset({"_sliding_window_pattern", "layer_switch", "use_parallel_embedding"}),
        {"use_parallel_block": True, "use_gated_activation": True, "use_embedding_sharing": True, "rotary_pct": 1.0}
        | {"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj"},
    ),
    "gpt_neox": Family(
        (*_LAYER_NORM, layers.neox_rope, layers.unlimited, rules.attention_bias, rules.parallel_residual),
        {"norm": "layer", "gated": False, "mlp_bias": True, "naming": "gpt_neox"} | {"fused_by_head": ("q", "k", "v")},
        {"hidden_act": "gelu", "attention_bias": True, "rotary_pct": 0.25},
    ),
    "phi": Family(
        (*_LAYER_NORM, layers.partial_rope, layers.unlimited, rules.head_norm),
        {"norm": "layer", "parallel": True, "shared_norm": True, "gated": False, "naming": "phi", "head_bias": True}
        | {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
        frozenset({"attention_dropout", "embd_pdrop", "resid_pdrop"}),  # 0.1 as published: of its own training
    ),
    "gemma": Family(
        (rules.sizes, rules.gemma_act, layers.plain_rope, layers.unlimited, *_GEMMA_READ),
        _GEMMA,
        _GEMMA_ABSENT | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        (*_GEMMA_SIZES, layers.plain_rope, layers.alternating_windows, *_GEMMA_READ, rules.gemma2_caps),
        _GEMMA | _SANDWICH,
        _GEMMA_ABSENT
        | {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}
        | {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        (*_GEMMA_SIZES, layers.gemma3_windows, layers.gemma3_ropes, *_GEMMA_READ, rules.gemma3_cap),
        _GEMMA | _SANDWICH | {"qk_norm": "head"},
        _GEMMA_ABSENT
        | {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}
        | {"query_pre_attn_scalar": 256, "sliding_window_pattern": 6},
        frozenset({"_sliding_window_pattern"}),  # what `layer_types` was made from
    ),
    "gpt2": Family(
        (rules.gpt2_sizes, layers.unlimited),
        {"learned_positions": True, "norm": "layer", "gated": False, "naming": "gpt2", "transposed": True}
        | {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"activation_function": "gelu_new"},
        # Dropout of its own training, heads it does not have here, and a switch of half-precision rounding.
        frozenset({"attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn"})
        | {f"summary_{key}" for key in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")},
    ),
    "mixtral": Family(
        (*_SIZES, functools.partial(layers.plain_rope, theta=1_000_000.0), layers.one_window, rules.mixtral_experts),
        {"naming": "mixtral"},
        {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        _ROUTER,
    ),
    "gpt_oss": Family(
        (rules.sizes, layers.gpt_oss_rope, layers.alternating_windows, rules.attention_bias, rules.gpt_oss_experts),
        {"norm": "rms_float32", "sinks": True, "mlp_bias": True, "naming": "gpt_oss", "experts_together": True},
        {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "attention_bias": True}
        | {"num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        _ROUTER | {"initial_context_length"},  # the rope says it; transformers does not read it here
    ),
    "qwen2_moe": Family(
        (*_USUAL, layers.every_second_early_window, rules.stated_qkv_bias, rules.qwen2_experts),
        {"naming": "qwen2_moe"},
        {"num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28, "decoder_sparse_step": 1}
        | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
        | {"shared_expert_intermediate_size": 5632},
        _ROUTER,
    ),
    "qwen3_moe": Family(
        (*_USUAL, layers.all_windows, rules.attention_bias, rules.qwen_experts),
        {"qk_norm": "head", "naming": "qwen3_moe"},
        {"num_key_value_heads": 4, "sliding_window": 4096}
        | {"decoder_sparse_step": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        _ROUTER | {"max_window_layers"},  # which transformers does not read here
    ),
    "qwen3_5_text": Family(
        (rules.sizes, *_HYBRID_READ),
        _HYBRID | {"naming": "qwen3_5", "fused_by_head": ("q", "q_gate")},
        _HYBRID_ABSENT | {"num_key_value_heads": 4},
        _HYBRID_INERT,
        _HYBRID_OWN | {"mlp_only_layers": []},
    ),
    "qwen3_5_moe_text": Family(
        (rules.expert_sizes, *_HYBRID_READ, rules.qwen3_5_experts),
        _HYBRID | {"naming": "qwen3_5_moe", "fused_by_head": ("q", "q_gate")},
        _HYBRID_ABSENT
        | {"num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8, "decoder_sparse_step": 1}
        | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True},
        _ROUTER | _HYBRID_INERT,
        _HYBRID_OWN,
    ),
    "qwen3_next": Family(
        (rules.sizes, *_HYBRID_READ, rules.qwen2_experts),
        _HYBRID | {"naming": "qwen3_next", "fused_by_head": ("q", "q_gate", *rules.LINEAR_INPUTS)},
        _HYBRID_ABSENT
        | {"num_key_value_heads": 2, "decoder_sparse_step": 1, "num_experts": 512, "num_experts_per_tok": 10}
        | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True},
        _ROUTER | _HYBRID_INERT,
        _HYBRID_OWN,
    ),
    "glm4_moe": Family(
        (*_SIZES, layers.partial_rope, layers.unlimited, rules.qkv_bias, rules.glm_qk_norm, rules.glm_experts),
        {"naming": "glm4_moe"},
        {"num_key_value_heads": 8, "partial_rotary_factor": 0.5, "n_routed_experts": 128, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 1408, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
        | {"routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
        _ROUTER,
    ),
    "deepseek_v2": Family(
        (*_LATENT_SIZES, layers.interleaved_latents, layers.unlimited, rules.attention_bias, rules.deepseek_v2_experts),
        absent=_LATENTS
        | {"q_lora_rank": 1536, "n_routed_experts": 64, "moe_intermediate_size": 1407, "n_shared_experts": 2}
        | {"routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "topk_method": "greedy"},
        inert=_ROUTER | _DEEPSEEK,
        own={"scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False},
    ),
    "glm4_moe_lite": Family(
        (*_LATENT_SIZES, layers.latent_attention, layers.unlimited, rules.attention_bias, rules.glm_lite_experts),
        absent={"num_key_value_heads": 20, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
        | {"qk_nope_head_dim": 192, "v_head_dim": 256, "rope_interleave": True, "num_nextn_predict_layers": 1}
        | {"n_routed_experts": 64, "moe_intermediate_size": 1536, "n_shared_experts": 1, "num_experts_per_tok": 4}
        | {"routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
        inert=_ROUTER | _DEEPSEEK,
        own={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "partial_rotary_factor": 1.0},
    ),
    "deepseek_v3": Family(
        (*_LATENT_SIZES, layers.latent_attention, layers.unlimited, rules.attention_bias, rules.glm_experts),
        absent=_LATENTS
        | {
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 256,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
        }
        | {"routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}
        | {"num_experts_per_tok": 8, "norm_topk_prob": True, "num_nextn_predict_layers": 1, "rope_interleave": True},
        inert=_ROUTER | _DEEPSEEK,
        own={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ),
}

_QWEN_IMAGES = frozenset({"vision_config", "language_model_only"})
_QWEN_IMAGES |= {f"{name}_token_id" for name in ("image", "video", "vision_start", "vision_end")}
WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        ("gemma3_text",),
        {"vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
        | {"num_attention_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6},
        frozenset({"vision_config", "mm_tokens_per_image"})
        | {f"{name}_token_{what}" for name in ("boi", "eoi", "image") for what in ("index", "id")},
    ),
    "qwen3_5": Wrapper(("qwen3_5_text",), {}, _QWEN_IMAGES),
    "qwen3_5_moe": Wrapper(("qwen3_5_moe_text",), {}, _QWEN_IMAGES),
    "mistral3": Wrapper(
        ("mistral", "ministral3"),
        {},
        frozenset({"vision_config", "image_token_index", "image_token_id", "projector_hidden_act"})
        | {"vision_feature_layer", "multimodal_projector_bias", "spatial_merge_size"},
    ),
}

CONFIG_REMEDY = "take config.json from the model's own repository"

# Families that one might expect here.
_NO_TOKEN = "its layers read an embedding of the token itself, which what stands in a slot has not"
_REFUSED = {
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _NO_TOKEN),
    **dict.fromkeys(("gemma4", "gemma4_text"), f"{_NO_TOKEN}, or have heads of two widths"),
    "phimoe": "it has its own way to choose experts, which the decoder has not",
    "kimi_k2": "a deepseek_v3 whose tokenizer is code of its own, which is not run",
}


def read_config(directory: Path, ignored: Collection[str] = ()) -> DecoderConfig:
    """Reads `directory/config.json`; `ignored` as in `parse_config`.

    Raises:
      UserError: the file is missing or malformed, the architecture is unknown, or a key is unread.
    """
    source = Path(directory) / "config.json"
    if not source.is_file():
        raise UserError(f"{source}: not found; backbone.path must be a Hugging Face model directory")
    return parse_config(read_object(source, CONFIG_REMEDY), source, ignored)


def say_ignored(directory: Path, ignored: Collection[str]) -> list[str]:
    """Gives a line for each key that is let past."""
    return [f"{directory / 'config.json'}: {key} is ignored, as backbone.ignored_keys says" for key in ignored]


def parse_config(values: dict[str, Any], source: Path, ignored: Collection[str] = ()) -> DecoderConfig:
    """`config.json` as a dict -> `DecoderConfig`.

    Args:
      values: of the file.
      source: names it in errors.
      ignored: unknown keys that are not refused: `backbone.ignored_keys`.
    """
    settings = values.get("quantization_config")
    if settings is not None:  # of the tensors: how they are read changes nothing here
        check_method(settings, source)
        values = {key: value for key, value in values.items() if key != "quantization_config"}
    config, unknown = _parse(values, source)
    if idle := sorted(set(ignored) - set(unknown)):
        raise UserError(f"backbone.ignored_keys: {source} has no unknown keys {idle}; take them out")
    if refused := [key for key in unknown if key not in ignored]:
        raise UserError(
            f"{source}: unknown keys {refused}; the decoder would ignore them, so the model is refused. "
            "Where you know that they change nothing, name them as backbone.ignored_keys (in e2p convert and e2p embed "
            "--ignored-keys), or take them out"
        )
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{source}: num_attention_heads is not a multiple of num_key_value_heads")
    held = sum(len(layers_with(config, name)) * math.prod(shape) for name, shape in layer_shapes(config).items())
    if held + config.vocab_size * config.hidden_size > _MOST_PARAMETERS:
        raise UserError(f"{source}: describes a model of more than {_MOST_PARAMETERS:.0e} parameters; {CONFIG_REMEDY}")
    return config


def _parse(values: dict[str, Any], source: Path) -> tuple[DecoderConfig, list[str]]:
    """The config and the unknown keys."""
    name = values.get("model_type")
    if isinstance(name, str) and name in WRAPPERS:
        return _parse_wrapper(WRAPPERS[name], values, source)
    if not isinstance(name, str) or name not in FAMILIES:
        reason = f" ({_REFUSED[name]})" if isinstance(name, str) and name in _REFUSED else ""
        known = ", ".join(sorted(FAMILIES | WRAPPERS))
        raise UserError(f"{source}: model_type {short(name)} is not supported{reason}; supported: {known}")
    family = FAMILIES[name]
    reader = Reader(family.absent | values, source, family.inert)
    fields: dict[str, Any] = {}
    for read in family.readers:
        fields |= read(reader, fields)
    config = DecoderConfig(**fields | family.flags)
    return config, reader.finish(rules.own_values(config) | family.own)


def _parse_wrapper(wrapper: Wrapper, values: dict[str, Any], source: Path) -> tuple[DecoderConfig, list[str]]:
    reader = Reader(values, source, wrapper.inert | {"tie_word_embeddings"})
    reader.settings("text_config", {})
    text = language_config(values)
    if text["model_type"] not in wrapper.families:
        reader.refuse("model_type of text_config", text["model_type"], f"one of {list(wrapper.families)}")
    config, unknown = _parse(text, source)
    return dataclasses.replace(config, wrapped=True), unknown + reader.finish(rules.own_values(config))


def language_config(values: dict[str, Any]) -> dict[str, Any]:
    """Gives the `config.json` of the language model alone, where the one given is of a wrapper."""
    if values["model_type"] not in WRAPPERS:
        return values
    wrapper = WRAPPERS[values["model_type"]]
    text = {"model_type": wrapper.families[0]} | wrapper.absent | (values.get("text_config") or {})
    of_the_whole = ("tie_word_embeddings", "quantization_config")
    return text | {key: values[key] for key in of_the_whole if values.get(key) is not None}


def unknown_keys(values: dict[str, Any], source: Path) -> list[str]:
    """What `parse_config` refuses unless it is to be ignored.

    Raises:
      UserError: the architecture is unknown, or a key has a value that is not supported.
    """
    return _parse(values, source)[1]


def inert_keys(values: dict[str, Any]) -> list[str]:
    """The keys of a readable `config.json` that change nothing, those of the language model in it among them."""
    name, text = values["model_type"], language_config(values)
    inert = INERT | FAMILIES[text["model_type"]].inert | (WRAPPERS[name].inert if name in WRAPPERS else frozenset())
    there = {key for held in (values, text) for key, value in held.items() if value is not None}
    return sorted(key for key in there - {"model_type"} if key in inert or key.startswith(INERT_STARTS))


def significant(values: dict[str, Any]) -> dict[str, Any]:
    """Picks what of a readable `config.json` has a say in the forward pass, or is read to find that out: the result is
    readable again. Null stays, which is not the same as absent.
    """
    inert = INERT - {"model_type"}
    return {key: value for key, value in values.items() if key not in inert}
