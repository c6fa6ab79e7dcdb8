"""Hugging Face model families as data: `config.json` -> `DecoderConfig`, and tensor names.

Every key of a `config.json` is either read here, checked to hold the one value that the decoder
implements, or listed as inert. Any other key is an error: a rope setting that nobody reads is the
field's classic silent failure.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from e2p_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864) with the scalings of HF `rope_scaling`."""

    theta: float = 10_000.0
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 0.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything the decoder needs to know about a backbone; sizes in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_epsilon: float
    rope: Rope
    tie_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    # Per layer: how many positions back a token sees (itself included); 0 is unlimited.
    windows: tuple[int, ...] = ()


# Keys that change nothing in the forward pass: bookkeeping, initialisation, generation, tensor-parallel hints.
_INERT = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path use_cache initializer_range
    pretraining_tp bos_token_id eos_token_id pad_token_id sep_token_id return_dict output_hidden_states
    output_attentions torchscript id2label label2id problem_type task_specific_params
    chunk_size_feed_forward finetuning_task tokenizer_class prefix auto_map attn_implementation
    _attn_implementation_autoset base_model_tp_plan is_llama_config tie_encoder_decoder
    transformers.js_config cross_attention_hidden_size
    output_past suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
""".split()  # noqa: SIM905 (forty names read better as prose)
)

# Switches of other architectures, which published configs of these families carry turned off.
_OFF = ("is_encoder_decoder", "add_cross_attention", "is_decoder", "rope_interleaved", "use_mrope")

# What transformers assumes where a family's config.json lacks the key; null is not the same as absent.
_ABSENT: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
}

_ROPE_SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_MISSING = object()


class _Reader:
    """Reads `config.json` key by key and remembers what was read."""

    def __init__(self, values: dict[str, Any], source: Path):
        self.values, self.source, self.read = values, source, set(_INERT)

    def take(self, key: str, default: Any = _MISSING) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise UserError(f"{self.source}: key {key!r} is missing; take config.json from the model's own repository")
        return default

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        value = self.take(key, default)
        if value not in allowed:
            raise UserError(f"{self.source}: {key}={value!r} is not supported; supported: {list(allowed)}")

    def finish(self) -> None:
        unread = sorted(key for key, value in self.values.items() if key not in self.read and value is not None)
        if unread:
            raise UserError(
                f"{self.source}: unknown keys {unread}; the decoder would ignore them, so the model is refused. "
                "Remove them if they are inert"
            )


def _rope(reader: _Reader) -> Rope:
    """Reads both dialects: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`)."""
    theta = reader.take("rope_theta", None)
    dialects = [reader.take(key, None) for key in ("rope_parameters", "rope_scaling")]
    defaults = {"rope_theta": 10_000.0 if theta is None else theta}
    ropes = {_parse_rope(defaults | settings, reader.source) for settings in dialects if settings}
    rope = ropes.pop() if ropes else _parse_rope(defaults, reader.source)
    if ropes or theta not in (None, rope.theta):
        raise UserError(
            f"{reader.source}: rope_parameters contradicts rope_scaling or rope_theta; "
            "keep what the model was trained with"
        )
    return rope


def _parse_rope(settings: dict[str, Any], source: Path) -> Rope:
    settings = {key: value for key, value in settings.items() if value is not None}
    legacy = settings.pop("type", "default")
    kind = settings.pop("rope_type", legacy)
    if kind not in _ROPE_SETTINGS:
        raise UserError(f"{source}: rope kind {kind!r} is not supported; supported: {', '.join(_ROPE_SETTINGS)}")
    names = _ROPE_SETTINGS[kind]
    if settings.keys() != {"rope_theta", *names}:
        raise UserError(f"{source}: rope kind {kind!r} needs the settings {list(names)}, has {sorted(settings)}")
    return Rope(float(settings["rope_theta"]), kind, **{name: float(settings[name]) for name in names})


def _llama_like(reader: _Reader) -> dict[str, Any]:
    """The fields that every family here shares."""
    heads = int(reader.take("num_attention_heads"))
    hidden = int(reader.take("hidden_size"))
    reader.require("hidden_act", ("silu",), "silu")
    reader.require("attention_dropout", (0, 0.0), 0.0)
    for switch in _OFF:
        reader.require(switch, (False,), False)
    return {
        "vocab_size": int(reader.take("vocab_size")),
        "hidden_size": hidden,
        "intermediate_size": int(reader.take("intermediate_size")),
        "num_layers": int(reader.take("num_hidden_layers")),
        "num_heads": heads,
        "num_kv_heads": int(reader.take("num_key_value_heads", heads)),
        "head_dim": int(reader.take("head_dim", hidden // heads)),
        "max_positions": int(reader.take("max_position_embeddings")),
        "norm_epsilon": float(reader.take("rms_norm_eps")),
        "rope": _rope(reader),
        "tie_head": bool(reader.take("tie_word_embeddings", False)),
    }


def _llama(reader: _Reader) -> dict[str, Any]:
    bias = bool(reader.take("attention_bias", False))
    return _llama_like(reader) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(reader.take("mlp_bias", False)),
    }


def _mistral(reader: _Reader) -> dict[str, Any]:
    fields = _llama_like(reader)
    return fields | {"windows": (int(reader.take("sliding_window", 0)),) * fields["num_layers"]}


def _qwen2(reader: _Reader) -> dict[str, Any]:
    fields = _llama_like(reader)
    layers = fields["num_layers"]
    window = int(reader.take("sliding_window", 0)) if reader.take("use_sliding_window", False) else 0
    reader.take("sliding_window", 0)
    # Qwen 2: the first `max_window_layers` layers see everything; transformers 5 spells it out per layer.
    first = int(reader.take("max_window_layers", layers))
    default = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    kinds = reader.take("layer_types", default)
    supported = {"full_attention", "sliding_attention"} if window else {"full_attention"}
    if not supported.issuperset(kinds):
        raise UserError(
            f"{reader.source}: layer_types {kinds} with a sliding window of {window}; supported: {sorted(supported)}"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return fields | {"qkv_bias": True, "windows": windows}


FAMILIES = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2}


def read_config(directory: Path) -> DecoderConfig:
    """Reads `directory/config.json`.

    Raises:
      UserError: the file is missing or malformed, the architecture is unknown, or a key is unread.
    """
    source = Path(directory) / "config.json"
    try:
        values = json.loads(source.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{source}: not found; backbone.path must be a Hugging Face model directory") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: line {error.lineno}: malformed JSON ({error.msg})") from error
    return parse_config(values, source)


def parse_config(values: dict[str, Any], source: Path) -> DecoderConfig:
    """`config.json` as a dict -> `DecoderConfig`; `source` names the file in errors."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{source}: model_type {family!r} is not supported; supported: {sorted(FAMILIES)}")
    reader = _Reader(_ABSENT.get(family, {}) | values, source)
    fields = FAMILIES[family](reader)
    reader.finish()
    fields.setdefault("windows", (0,) * fields["num_layers"])
    config = DecoderConfig(**fields)
    if len(config.windows) != config.num_layers:
        raise UserError(f"{source}: layer_types has {len(config.windows)} entries for {config.num_layers} layers")
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{source}: num_attention_heads is not a multiple of num_key_value_heads")
    return config


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Parameter path -> Hugging Face tensor name; `{}` stands for the layer, stacked on axis 0."""
    layer = {
        "attention_norm": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    }
    if config.qkv_bias:
        layer |= {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
    if config.output_bias:
        layer["o_bias"] = "self_attn.o_proj.bias"
    if config.mlp_bias:
        layer |= {f"{name}_bias": f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")}
    names = {f"layers/{ours}": f"model.layers.{{}}.{theirs}" for ours, theirs in layer.items()}
    names |= {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    if not config.tie_head:
        names["head"] = "lm_head.weight"
    return names


def rope_frequencies(rope: Rope, head_dim: int) -> list[float]:
    """Inverse frequencies, `head_dim // 2` of them, in radians per position.

    `linear` divides all by `factor`; `llama3` divides the low ones, keeps the high ones and blends between
    (Llama 3.1 release, `apply_scaling`; transformers `modeling_rope_utils`).
    """
    inverse = [rope.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
    if rope.kind == "linear":
        return [f / rope.factor for f in inverse]
    if rope.kind == "llama3":
        low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings

        def scale(f: float) -> float:
            turns = original * f / (2 * math.pi)  # rotations over the original context
            blend = min(max((turns - low) / (high - low), 0.0), 1.0)
            return (1 - blend) * f / rope.factor + blend * f

        return [scale(f) for f in inverse]
    return inverse
