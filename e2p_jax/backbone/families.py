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
from e2p_jax.backbone.config_reader import INERT, Read, Reader, short
from e2p_jax.backbone.layout import DecoderConfig, layer_shapes
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


# What most families read first.
_SIZES = (rules.sizes, rules.hidden_act)
_USUAL = (*_SIZES, layers.plain_rope)

_GEMMA_READ = (rules.attention_bias, rules.gemma_embedding)
_GEMMA_SIZES = (rules.sizes, rules.hidden_activation, rules.query_scalar)
_GEMMA = {"norm": "rms_one_plus"}
_SANDWICH = {"post_norms": True, "naming": "sandwich"}
_GEMMA_ABSENT = {"tie_word_embeddings": True, "head_dim": 256}
# Training's: the loss that balances experts.
_ROUTER = frozenset({"router_aux_loss_coef", "output_router_logits"})
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
    "qwen3_moe": Family(
        (*_USUAL, layers.all_windows, rules.attention_bias, rules.qwen_experts),
        {"qk_norm": "head", "naming": "qwen3_moe"},
        {"num_key_value_heads": 4, "sliding_window": 4096}
        | {"decoder_sparse_step": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        _ROUTER | {"intermediate_size", "max_window_layers"},  # of dense layers; what transformers does not read here
    ),
}

_REMEDY = "take config.json from the model's own repository"

# Families that one might expect here.
_REFUSED = {
    "gemma3": "it reads images as well; docs/backbones.md says how to save its language model apart",
    "qwen2_moe": "it has an expert that all tokens share, which the decoder has not",
    "phimoe": "it has its own way to choose experts, which the decoder has not",
}


def read_config(directory: Path, ignored: Collection[str] = ()) -> DecoderConfig:
    """Reads `directory/config.json`; `ignored` as in `parse_config`.

    Raises:
      UserError: the file is missing or malformed, the architecture is unknown, or a key is unread.
    """
    source = Path(directory) / "config.json"
    if not source.is_file():
        raise UserError(f"{source}: not found; backbone.path must be a Hugging Face model directory")
    return parse_config(read_object(source, _REMEDY), source, ignored)


def parse_config(values: dict[str, Any], source: Path, ignored: Collection[str] = ()) -> DecoderConfig:
    """`config.json` as a dict -> `DecoderConfig`.

    Args:
      values: of the file.
      source: names it in errors.
      ignored: unknown keys that are not refused: `backbone.ignored_keys`.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        reason = f" ({_REFUSED[name]})" if isinstance(name, str) and name in _REFUSED else ""
        raise UserError(f"{source}: model_type {short(name)} is not supported{reason}; supported: {sorted(FAMILIES)}")
    family = FAMILIES[name]
    reader = Reader(family.absent | values, source, family.inert)
    fields: dict[str, Any] = {}
    for read in family.readers:
        fields |= read(reader, fields)
    config = DecoderConfig(**fields | family.flags)
    reader.finish(rules.own_values(config), ignored)
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{source}: num_attention_heads is not a multiple of num_key_value_heads")
    held = config.num_layers * sum(math.prod(shape) for shape in layer_shapes(config).values())
    if held + config.vocab_size * config.hidden_size > _MOST_PARAMETERS:
        raise UserError(f"{source}: describes a model of more than {_MOST_PARAMETERS:.0e} parameters; {_REMEDY}")
    return config


def significant(values: dict[str, Any]) -> dict[str, Any]:
    """Picks what of a readable `config.json` has a say in the forward pass, or is read to find that out: the result is
    readable again. Null stays, which is not the same as absent.
    """
    inert = INERT - {"model_type"}
    return {key: value for key, value in values.items() if key not in inert}
