"""Hugging Face model families as data: `config.json` -> `DecoderConfig`.

Every key of a `config.json` is either read here, checked to hold a value that the decoder implements, or listed
as inert. Any other key is an error: a rope setting that nobody reads is the field's classic silent failure.
A family is an entry of `FAMILIES`: what its keys are read by, and the flags of the decoder that they leave open.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from e2p_jax.backbone.layout import DecoderConfig, layer_shapes
from e2p_jax.backbone.rope import Rope, parse_rope
from e2p_jax.errors import UserError
from e2p_jax.json_files import is_number, read_object

# Keys that change nothing in the forward pass: bookkeeping, initialisation, generation, tensor-parallel hints.
_INERT = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path use_cache initializer_range
    pretraining_tp bos_token_id eos_token_id pad_token_id sep_token_id return_dict output_hidden_states
    output_attentions torchscript id2label label2id problem_type task_specific_params
    chunk_size_feed_forward finetuning_task tokenizer_class prefix auto_map attn_implementation
    _attn_implementation_autoset base_model_tp_plan is_llama_config tie_encoder_decoder
    transformers.js_config cross_attention_hidden_size cache_implementation
    _num_labels output_past suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
""".split()  # noqa: SIM905 (forty names read better as prose)
)

# Switches of other architectures, which published configs of these families carry turned off.
_OFF = (
    *("is_encoder_decoder", "add_cross_attention", "is_decoder", "rope_interleaved", "use_mrope"),
    *("use_bidirectional_attention", "scale_attn_by_inverse_layer_idx"),
)

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

_MISSING = object()
# Far beyond any model: what is more is a slip or damage, and is refused before anything is built of that size.
_MOST_LAYERS, _MOST_EXPERTS, _MOST_HEAD_DIM, _MOST_PARAMETERS = 1000, 4096, 1 << 14, 10**15


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Reader:
    """Reads `config.json` key by key and remembers what was read."""

    def __init__(self, values: dict[str, Any], source: Path, inert: frozenset[str]):
        self.values, self.source, self.read = values, source, set(_INERT | inert)

    def take(self, key: str, default: Any = _MISSING) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise UserError(f"{self.source}: key {key!r} is missing; take config.json from the model's own repository")
        return default

    def size(self, key: str, default: Any = _MISSING, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number of things."""
        value = self.take(key, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: Any = _MISSING, zero: bool = False) -> float:
        """Above zero, or zero where that means something."""
        value = self.take(key, default)
        if not is_number(value) or not (value > 0 or (zero and value == 0)):
            self.refuse(key, value, f"a number {'from' if zero else 'above'} 0")
        return float(value)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            self.refuse(key, value, "true or false")
        return value

    def settings(self, key: str, default: Any = None) -> dict[str, Any] | None:
        """An object of settings, or null."""
        value = self.take(key, default)
        if value is not None and type(value) is not dict:
            self.refuse(key, value, "an object of settings")
        return value

    def each(self, key: str, default: list[Any], kind: type) -> list[Any]:
        """A list of values of one type."""
        value = self.take(key, default)
        if type(value) is not list or any(type(item) is not kind for item in value):
            self.refuse(key, value, f"a list of {kind.__name__}")
        return value

    def refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(f"{self.source}: {key} is {_short(value)}; it must be {wanted}")

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        value = self.take(key, default)
        if value not in allowed:
            raise UserError(f"{self.source}: {key}={_short(value)} is not supported; supported: {list(allowed)}")

    def activation(self, key: str) -> str:
        self.require(key, tuple(_ACTIVATIONS), "silu")
        return _ACTIVATIONS[self.values.get(key) or "silu"]

    def finish(self) -> None:
        unread = sorted(key for key, value in self.values.items() if key not in self.read and value is not None)
        if unread:
            raise UserError(
                f"{self.source}: unknown keys {unread}; the decoder would ignore them, so the model is refused. "
                "Remove them if they are inert"
            )


# What is read so far -> what a part of `config.json` adds to it.
_Read = Callable[[_Reader, dict[str, Any]], dict[str, Any]]


def _sizes(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """The keys that every family but GPT-2 shares."""
    heads = reader.size("num_attention_heads")
    hidden = reader.size("hidden_size")
    head_dim = reader.size("head_dim", hidden // heads, most=_MOST_HEAD_DIM)
    if reader.values.get("head_dim") is None and hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size, {hidden}, where there is no head_dim")
    reader.require("attention_dropout", (0, 0.0), 0.0)
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.size("intermediate_size"),
        "num_layers": reader.size("num_hidden_layers", most=_MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": reader.size("num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_positions": reader.size("max_position_embeddings"),
        "norm_epsilon": reader.number("rms_norm_eps"),
        "attention_scale": head_dim**-0.5,
        "tie_head": reader.flag("tie_word_embeddings", False),
    }


def _gpt2_sizes(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = reader.size("n_embd"), reader.size("n_head")
    positions = reader.size("n_positions")
    reader.require("n_ctx", (positions,), positions)
    scaled = reader.flag("scale_attn_weights", True)
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.size("n_inner", 4 * hidden),
        "num_layers": reader.size("n_layer", most=_MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_positions": positions,
        "norm_epsilon": reader.number("layer_norm_epsilon"),
        "attention_scale": (hidden // heads) ** -0.5 if scaled else 1.0,
        "tie_head": reader.flag("tie_word_embeddings", True),
        "activation": reader.activation("activation_function"),
    }


def _hidden_act(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"activation": reader.activation("hidden_act")}


def _gemma_act(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """The first releases say `gelu` and mean its tanh form, as `hidden_activation` came to say."""
    reader.require("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    activation = reader.activation("hidden_act")
    return {"activation": "gelu_tanh" if activation == "gelu" else activation}


def _hidden_activation(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Published configs repeat it as `hidden_act`, which transformers does not read here."""
    named = reader.take("hidden_activation")
    reader.require("hidden_act", (named,), named)
    return {"activation": reader.activation("hidden_activation")}


def _attention_bias(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    bias = reader.flag("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias}


def _mlp_bias(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"mlp_bias": reader.flag("mlp_bias", False)}


def _phi3_off(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Refuses what no published model has, though some name it."""
    for key in ("resid_pdrop", "embd_pdrop"):
        reader.require(key, (0, 0.0), 0.0)
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.require(key, (False,), False)
    return {}


def _experts(reader: _Reader, count: int, normalise: bool) -> dict[str, Any]:
    chosen = reader.size("num_experts_per_tok", least=0)
    if not 1 <= chosen <= count:
        raise UserError(f"{reader.source}: num_experts_per_tok={chosen} of {count} experts (num_local_experts)")
    return {"num_experts": count, "experts_per_token": chosen, "normalise_topk": normalise}


def _mixtral_experts(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    reader.require("router_jitter_noise", (0, 0.0), 0.0)
    return _experts(reader, reader.size("num_local_experts", most=_MOST_EXPERTS), normalise=True)


def _qwen_experts(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """In every layer. Published configs say `num_experts`, transformers 5 writes `num_local_experts`."""
    step, dense = reader.size("decoder_sparse_step"), reader.each("mlp_only_layers", [], int)
    if step != 1 or dense:
        raise UserError(
            f"{reader.source}: decoder_sparse_step={step} and mlp_only_layers={dense} put dense layers among those "
            "with experts; the decoder, one scan over like layers, needs 1 and []"
        )
    count = reader.size("num_local_experts", reader.take("num_experts", 128), most=_MOST_EXPERTS)
    reader.require("num_experts", (count,), count)
    read = _experts(reader, count, reader.flag("norm_topk_prob", False))
    return read | {"intermediate_size": reader.size("moe_intermediate_size")}


def _query_scalar(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"attention_scale": reader.number("query_pre_attn_scalar") ** -0.5}


def _gemma_embedding(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"embedding_scale": fields["hidden_size"] ** 0.5}


def _gemma2_caps(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_cap": reader.number("attn_logit_softcapping", 0.0, zero=True),
        "logit_cap": reader.number("final_logit_softcapping", 0.0, zero=True),
    }


def _gemma3_cap(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """The key for attention scores exists here as well, but transformers caps nothing by it."""
    reader.require("attn_logit_softcapping", (None,), None)
    return {"logit_cap": reader.number("final_logit_softcapping", 0.0, zero=True)}


def _one_rope(
    reader: _Reader,
    fields: dict[str, Any],
    dialects: list[dict[str, Any] | None],
    theta: tuple[str, float],
    partial: bool = False,
) -> tuple[Rope, int]:
    """A rope that both dialects may describe: transformers 4 (`rope_theta`, `rope_scaling`), 5 (`rope_parameters`).

    Args:
      dialects: what each says, None where it says nothing.
      theta: the key of the base, and its value where nothing says it.
      partial: whether `partial_rotary_factor` is known.
    """
    key, default = theta
    given = reader.take(key, None)
    base: dict[str, Any] = {"rope_theta": default if given is None else given}
    if partial:
        base["partial_rotary_factor"] = reader.take("partial_rotary_factor", 1.0)
    for settings in dialects:
        if settings is not None and type(settings) is not dict:
            raise UserError(f"{reader.source}: the settings of a rope are {_short(settings)}; they must be an object")
    stated = [{k: v for k, v in settings.items() if v is not None} for settings in dialects if settings]
    parse = functools.partial(
        parse_rope,
        head_dim=fields["head_dim"],
        max_positions=fields["max_positions"],
        partial=partial,
        source=reader.source,
    )
    ropes = {parse(base | settings) for settings in stated or [{}]}
    if len(ropes) > 1 or any(settings.get("rope_theta", given) != given for settings in stated if given is not None):
        raise UserError(
            f"{reader.source}: rope_parameters contradicts rope_scaling or {key}; keep what the model was trained with"
        )
    return ropes.pop()


def _rope(reader: _Reader, fields: dict[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """One rope for all layers."""
    dialects = [reader.settings(key) for key in ("rope_parameters", "rope_scaling")]
    rope, limit = _one_rope(reader, fields, dialects, ("rope_theta", theta))
    return {"ropes": (rope,), "layer_ropes": (0,) * fields["num_layers"], "max_positions": limit}


def _phi3_rope(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Older names of longrope, and the length it was trained with beside it instead of in it."""
    original = reader.size("original_max_position_embeddings")

    def spelled(settings: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = settings and settings.get("rope_type", settings.get("type"))
        if not settings or kind not in ("longrope", "su", "yarn"):
            return settings
        return {k: v for k, v in settings.items() if k != "type"} | {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
        }

    dialects = [spelled(reader.settings(key)) for key in ("rope_parameters", "rope_scaling")]
    rope, limit = _one_rope(reader, fields, dialects, ("rope_theta", 10_000.0), partial=True)
    return {"ropes": (rope,), "layer_ropes": (0,) * fields["num_layers"], "max_positions": limit}


def _smollm3_rope(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Every fourth layer without positions, unless `no_rope_layers` (1: with) says otherwise."""
    read = _rope(reader, fields, theta=2_000_000.0)
    layers = fields["num_layers"]
    interval = reader.size("no_rope_layer_interval")
    rotated = reader.each("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)], int)
    if len(rotated) != layers:
        raise UserError(f"{reader.source}: no_rope_layers has {len(rotated)} entries for {layers} layers")
    (rope,) = read["ropes"]
    nope = Rope((0.0,) * len(rope.frequencies))
    return read | {"ropes": (rope, nope), "layer_ropes": tuple(0 if r else 1 for r in rotated)}


def _gemma3_ropes(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """One rope for the layers that see everything, one for those with a window."""
    nested = reader.settings("rope_parameters", {}) or {}
    if not nested.keys() <= {"full_attention", "sliding_attention"}:
        raise UserError(f"{reader.source}: rope_parameters {sorted(nested)}; needs full_attention, sliding_attention")
    scaling = reader.settings("rope_scaling")
    full, limit = _one_rope(reader, fields, [nested.get("full_attention"), scaling], ("rope_theta", 1_000_000.0))
    local, local_limit = _one_rope(
        reader, fields, [nested.get("sliding_attention")], ("rope_local_base_freq", 10_000.0)
    )
    which = tuple(int(window > 0) for window in fields["windows"])
    return {"ropes": (full, local), "layer_ropes": which, "max_positions": min(limit, local_limit)}


def _unlimited(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"windows": (0,) * fields["num_layers"]}


def _one_window(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"windows": (reader.size("sliding_window", 0, least=0),) * fields["num_layers"]}


def _layer_windows(reader: _Reader, fields: dict[str, Any], window: int, default: list[bool]) -> dict[str, Any]:
    """`layer_types`, or where it is absent `default`: which layers have the window."""
    default_kinds = ["sliding_attention" if sliding else "full_attention" for sliding in default]
    kinds = reader.each("layer_types", default_kinds, str)
    supported = {"full_attention", "sliding_attention"} if window else {"full_attention"}
    if not supported.issuperset(kinds):
        raise UserError(
            f"{reader.source}: layer_types {kinds} with a sliding window of {window}; supported: {sorted(supported)}"
        )
    if len(kinds) != fields["num_layers"]:
        raise UserError(f"{reader.source}: layer_types has {len(kinds)} entries for {fields['num_layers']} layers")
    return {"windows": tuple(window if kind == "sliding_attention" else 0 for kind in kinds)}


def _switched_window(reader: _Reader) -> int:
    """`sliding_window`, where `use_sliding_window` turns it on."""
    window = reader.size("sliding_window", 0, least=0)
    return window if reader.flag("use_sliding_window", False) else 0


def _late_windows(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen: the first `max_window_layers` layers see everything."""
    window, layers = _switched_window(reader), fields["num_layers"]
    first = reader.size("max_window_layers", layers, least=0)
    return _layer_windows(reader, fields, window, [bool(window) and i >= first for i in range(layers)])


def _all_windows(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-MoE: all layers have the window, if there is one."""
    return {"windows": (_switched_window(reader),) * fields["num_layers"]}


def _nope_windows(reader: _Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """SmolLM3: the layers without positions are those with a window, if there is one."""
    window = _switched_window(reader)
    return _layer_windows(reader, fields, window, [bool(window) and rope == 1 for rope in fields["layer_ropes"]])


def _alternating_windows(reader: _Reader, fields: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    """Gemma: every second layer sees everything, or as often as `key` says."""
    every = reader.size(key) if key else 2
    window = reader.size("sliding_window", 0, least=0)
    return _layer_windows(reader, fields, window, [(i + 1) % every > 0 for i in range(fields["num_layers"])])


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type`, and how its `config.json` is read."""

    readers: tuple[_Read, ...]
    """In order; each may use what the ones before have read."""
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `DecoderConfig` that are the same in all models of the family."""
    absent: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What transformers assumes where `config.json` lacks the key; null is not the same as absent."""
    inert: frozenset[str] = frozenset()
    """Keys without effect on a frozen forward pass, beside those of all families."""


_GEMMA = {"norm": "rms_one_plus"}
_SANDWICH = {"post_norms": True, "naming": "sandwich"}
_GEMMA_ABSENT = {"tie_word_embeddings": True, "head_dim": 256}
# Training's: the loss that balances experts.
_ROUTER = frozenset({"router_aux_loss_coef", "output_router_logits"})
_QWEN_ABSENT = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family((_sizes, _hidden_act, _rope, _unlimited, _attention_bias, _mlp_bias)),
    "mistral": Family(
        (_sizes, _hidden_act, _rope, _one_window), absent={"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2": Family((_sizes, _hidden_act, _rope, _late_windows), {"qkv_bias": True}, _QWEN_ABSENT),
    "qwen3": Family(
        (_sizes, _hidden_act, _rope, _late_windows, _attention_bias),
        {"qk_norm": "head"},
        _QWEN_ABSENT | {"head_dim": 128},
    ),
    "phi3": Family(
        (_sizes, _hidden_act, _phi3_rope, _one_window, _phi3_off),
        {"naming": "fused"},
        {"original_max_position_embeddings": 4096},
        frozenset({"full_attn_mod", "interpolate_factor"}),  # of Phi-4-mini; its own code does not read them either
    ),
    "smollm3": Family(
        (_sizes, _hidden_act, _smollm3_rope, _nope_windows, _attention_bias, _mlp_bias),
        absent={"num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        inert=frozenset({"max_window_layers"}),  # Qwen's, left in SmolLM3-3B
    ),
    "olmo2": Family(
        (_sizes, _hidden_act, _rope, _unlimited, _attention_bias),
        _SANDWICH | {"pre_norms": False, "norm": "rms_float32", "qk_norm": "all"},
    ),
    "gemma": Family(
        (_sizes, _gemma_act, _rope, _unlimited, _attention_bias, _gemma_embedding),
        _GEMMA,
        _GEMMA_ABSENT | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        (
            *(_sizes, _hidden_activation, _rope, _alternating_windows),
            *(_attention_bias, _gemma_embedding, _query_scalar, _gemma2_caps),
        ),
        _GEMMA | _SANDWICH,
        _GEMMA_ABSENT
        | {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}
        | {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        (
            *(_sizes, _hidden_activation, functools.partial(_alternating_windows, key="sliding_window_pattern")),
            *(_gemma3_ropes, _attention_bias, _gemma_embedding, _query_scalar, _gemma3_cap),
        ),
        _GEMMA | _SANDWICH | {"qk_norm": "head"},
        _GEMMA_ABSENT
        | {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}
        | {"query_pre_attn_scalar": 256, "sliding_window_pattern": 6},
        frozenset({"_sliding_window_pattern"}),  # what `layer_types` was made from
    ),
    "gpt2": Family(
        (_gpt2_sizes, _unlimited),
        {"learned_positions": True, "norm": "layer", "gated": False, "naming": "gpt2", "transposed": True}
        | {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"activation_function": "gelu_new"},
        # Dropout of its own training, heads it does not have here, and a switch of half-precision rounding.
        frozenset({"attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn"})
        | {f"summary_{key}" for key in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")},
    ),
    "mixtral": Family(
        (_sizes, _hidden_act, functools.partial(_rope, theta=1_000_000.0), _one_window, _mixtral_experts),
        {"naming": "mixtral"},
        {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        _ROUTER,
    ),
    "qwen3_moe": Family(
        (_sizes, _hidden_act, _rope, _all_windows, _attention_bias, _qwen_experts),
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


def read_config(directory: Path) -> DecoderConfig:
    """Reads `directory/config.json`.

    Raises:
      UserError: the file is missing or malformed, the architecture is unknown, or a key is unread.
    """
    source = Path(directory) / "config.json"
    if not source.is_file():
        raise UserError(f"{source}: not found; backbone.path must be a Hugging Face model directory")
    return parse_config(read_object(source, _REMEDY), source)


def parse_config(values: dict[str, Any], source: Path) -> DecoderConfig:
    """`config.json` as a dict -> `DecoderConfig`; `source` names the file in errors."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        reason = f" ({_REFUSED[name]})" if isinstance(name, str) and name in _REFUSED else ""
        raise UserError(f"{source}: model_type {_short(name)} is not supported{reason}; supported: {sorted(FAMILIES)}")
    family = FAMILIES[name]
    reader = _Reader(family.absent | values, source, family.inert)
    fields: dict[str, Any] = {}
    for read in family.readers:
        fields |= read(reader, fields)
    for switch in _OFF:
        reader.require(switch, (False,), False)
    reader.finish()
    config = DecoderConfig(**fields | family.flags)
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
    inert = _INERT - {"model_type"}
    return {key: value for key, value in values.items() if key not in inert}
