"""Metadata -> what `config.json` and `generation_config.json` of the same model say.

As in `families`, a key of the architecture that is not read here is an error: llama.cpp's names are many, and a factor
that nobody reads gives another model.
"""

import dataclasses
from typing import Any

import numpy as np

from e2p_jax.backbone.gguf.file import GgufFile
from e2p_jax.errors import UserError
from e2p_jax.json_files import is_number


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A `general.architecture`: which family it is, and what llama.cpp's converter did to its tensors."""

    model_type: str
    interleaved: bool = False
    """Rows of queries and keys are in the order of Meta's release: pairs that rotate together stand side by side."""
    norm_offset: float = 0.0
    """What was added to the weights of norms."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of `config.json` that are the same in all models, and that the metadata does not tell."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of llama.cpp -> of `config.json`, beside those of all."""
    epsilon: str = "rms"
    """Which norms' epsilon there must be: `rms`, or `layer` of LayerNorm."""
    experts: str = ""
    """The key of `config.json` that says how many experts there are; empty where there are none."""
    biased: bool = False
    """`attention_bias` is said by the tensors."""
    partial: bool = False
    """`partial_rotary_factor` is not 1 where nothing says it."""


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, biased=True),
    "qwen2": Architecture("qwen2", settings={"use_sliding_window": False}),
    "qwen3": Architecture("qwen3", settings={"use_sliding_window": False}),
    "qwen3moe": Architecture(
        "qwen3_moe", settings={"use_sliding_window": False, "norm_topk_prob": True}, experts="num_experts"
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        settings={"use_sliding_window": False, "norm_topk_prob": False},
        keys={"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        experts="num_experts",
    ),
    "gemma": Architecture("gemma", norm_offset=1.0, settings={"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": Architecture("gemma2", norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", norm_offset=1.0),
    "phi3": Architecture("phi3"),
    "phi2": Architecture("phi", epsilon="layer", partial=True),
    "granite": Architecture(
        "granite",
        interleaved=True,
        biased=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "olmo2": Architecture("olmo2", biased=True),
    "smollm3": Architecture("smollm3", interleaved=True, biased=True),
    "arcee": Architecture("arcee", interleaved=True, biased=True, settings={"hidden_act": "relu2"}),
    "seed_oss": Architecture("seed_oss", biased=True),
    "glm4": Architecture("glm4", biased=True, partial=True),
    "exaone4": Architecture("exaone4"),
    "cohere2": Architecture("cohere2", epsilon="layer", biased=True, keys={"logit_scale": "logit_scale"}),
    "gpt-oss": Architecture("gpt_oss", experts="num_local_experts"),
}

# Of llama.cpp, behind the architecture's name -> of config.json.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_NEEDED = (*("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),)
# What says nothing that counts: the vocabulary's size is the embedding's, `finetuned` is a note.
_INERT = ("vocab_size", "rope.scaling.finetuned")
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "attn_factor": "attention_factor"}
# Of tensors that are settings.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
# Layers of the models whose scale of attention is not that of their kin: Gemma 2 and 3 27B have hidden / heads.
_LARGEST = {"gemma2": 46, "gemma3": 62}


class _Keys:
    """The architecture's part of the metadata; remembers what was read."""

    def __init__(self, file: GgufFile, name: str):
        self.file, self.name = file, name
        front = f"{name}."
        self.values = {key.removeprefix(front): v for key, v in file.metadata.items() if key.startswith(front)}
        self.read = {"vocab_size", *_INERT}

    def take(self, key: str) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if isinstance(value, list) and value and len(set(value)) == 1:  # one a layer, all the same
            return value[0]
        if value is not None and not isinstance(value, bool | str) and not is_number(value):
            raise self.refusal(f"{self.name}.{key} is {str(value)[:60]}, and one number is supported")
        return _decimal(value) if isinstance(value, float) else value

    def each(self, key: str) -> list[bool] | None:
        """One for each layer, where the metadata has it."""
        self.read.add(key)
        value = self.values.get(key)
        if value is not None and (not isinstance(value, list) or any(type(item) is not bool for item in value)):
            raise self.refusal(f"{self.name}.{key} is {str(value)[:60]}, and true or false for each layer is supported")
        return value

    def refusal(self, why: str) -> UserError:
        return UserError(f"{self.file.path}: {why}; use the model's own Hugging Face directory")

    def finish(self) -> None:
        if unread := sorted(self.values.keys() - self.read):
            raise self.refusal(f"its metadata has keys that would be ignored: {self.name}.{', '.join(unread)}")


def architecture(file: GgufFile) -> Architecture:
    """
    Raises:
      UserError: not among `ARCHITECTURES`.
    """
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"{file.path}: architecture {name[:60]!r} is not supported; supported: {sorted(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def make_config(file: GgufFile) -> dict[str, Any]:
    """`config.json`.

    Raises:
      UserError: an architecture or a setting that is not known.
    """
    kind, keys = architecture(file), _Keys(file, file.text("general.architecture"))
    config: dict[str, Any] = {"model_type": kind.model_type, **kind.settings}
    needed = (*_NEEDED, f"attention.layer_norm_{'rms_' if kind.epsilon == 'rms' else ''}epsilon")
    for theirs, ours in (_KEYS | kind.keys).items():
        value = keys.take(theirs)
        if theirs in needed and (not is_number(value) or value <= 0):
            raise keys.refusal(f"its metadata has no {keys.name}.{theirs} above 0")
        if value is not None:
            config[ours] = value
    experts = {key: config.pop(key, 0) for key in ("num_experts", "num_experts_per_tok")}
    if experts["num_experts"]:
        if kind.model_type == "llama":  # llama.cpp's name for Mixtral
            config["model_type"] = "mixtral"
        elif not kind.experts:
            raise keys.refusal(f"architecture {keys.name!r} with experts is not supported")
        config[kind.experts or "num_local_experts"] = experts["num_experts"]
        config["num_experts_per_tok"] = experts["num_experts_per_tok"]
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("rope_theta", 10_000.0)
    if keys.take("attention.value_length") not in (None, config["head_dim"]):
        raise keys.refusal("keys and values of different lengths are not supported")
    if kind.model_type in ("gemma2", "gemma3_text"):
        largest = config["num_hidden_layers"] == _LARGEST[keys.name]
        scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
        config |= {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}
    if kind.model_type == "gemma2":  # what llama.cpp takes where older files say nothing
        config = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096} | config
    if kind.model_type == "phi3":
        config.setdefault("sliding_window", None)
    if kind.model_type in ("olmo2", "exaone4") and (slides := keys.each("attention.sliding_window_pattern")):
        config["layer_types"] = [f"{'sliding' if slide else 'full'}_attention" for slide in slides]
    if kind.model_type == "olmo2" and "layer_types" in config:
        config["model_type"] = "olmo3"
        if config.pop("rope_local_base_freq", config["rope_theta"]) != config["rope_theta"]:
            raise keys.refusal("another base of the rope in layers with a window is not supported")
    if kind.model_type == "exaone4":
        config.setdefault("sliding_window", None)
    if kind.model_type == "gpt_oss":  # it says the width of an expert twice
        config["intermediate_size"] = config.pop("moe_intermediate_size", config["intermediate_size"])
    rotated = keys.take("rope.dimension_count") or config["head_dim"]
    if rotated != config["head_dim"] or kind.partial:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    config |= _rope_scaling(keys, config)
    if kind.model_type == "gpt_oss" and "rope_scaling" in config:
        config["rope_scaling"]["truncate"] = False
    keys.finish()
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise keys.refusal("it has no token_embd.weight")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if kind.biased and config["model_type"] != "mixtral":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if config["model_type"] == "seed_oss":
        config["attention_out_bias"] = "blk.0.attn_output.bias" in file.tensors
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = file.token(theirs)
    return config


def make_generation_config(file: GgufFile) -> dict[str, Any]:
    """`generation_config.json`: which tokens end a reply."""
    ends = [file.token(name) for name in ("eos", "eot", "eom")]
    return {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}


def _rope_scaling(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """What the metadata and the tensors among the settings say of a rope that is not the plain one."""
    name, factor = keys.take("rope.scaling.type"), keys.take("rope.scaling.factor")
    original = keys.take("rope.scaling.original_context_length")
    given = {ours: keys.take(f"rope.scaling.{theirs}") for theirs, ours in _YARN.items()}
    given = {key: value for key, value in given.items() if value is not None}
    factors = {tensor: _numbers(keys.file, tensor) for tensor in ROPE_TENSORS if tensor in keys.file.tensors}
    if factors.keys() == set(ROPE_TENSORS[1:]):
        short, long = factors.values()
        settings = {"rope_type": "longrope", "short_factor": short, "long_factor": long, **given}
        return {"rope_scaling": settings, "original_max_position_embeddings": original}
    if factors.keys() == {ROPE_TENSORS[0]} and name in (None, "none"):
        return {"rope_scaling": _llama3(keys, factors[ROPE_TENSORS[0]], config)}
    if factors:
        raise keys.refusal(f"a rope with {sorted(factors)} and scaling {name!r} is not supported")
    if name in (None, "none") or (name == "linear" and factor in (None, 1.0)):
        return {"original_max_position_embeddings": original} if original and config["model_type"] == "phi3" else {}
    if name == "linear" and not given:
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if name == "yarn":
        settings = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **given}
        return {"rope_scaling": settings}
    raise keys.refusal(f"a rope of kind {name!r} with {sorted(given)} is not supported")


def _llama3(keys: _Keys, divisors: list[float], config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's rope, of which a file keeps what each frequency is divided by: found again with its published bounds.

    Imported late: `rope` is the decoder's own.
    """
    from e2p_jax.backbone.rope import parse_rope

    settings = {
        "rope_type": "llama3",
        "factor": max(divisors),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = {"rope_theta": config["rope_theta"]}
    shape: dict[str, Any] = {"head_dim": config["head_dim"], "max_positions": 1, "partial": False}
    plain, _ = parse_rope(base, **shape, source=keys.file.path)
    found, _ = parse_rope(base | settings, **shape, source=keys.file.path)
    expected = np.divide(plain.frequencies, found.frequencies)
    if len(divisors) != len(expected) or not np.allclose(divisors, expected, rtol=1e-3):
        raise keys.refusal(f"{ROPE_TENSORS[0]} is not what Llama 3.1's rope gives")
    return settings


def _numbers(file: GgufFile, name: str) -> list[float]:
    """A small tensor of float32."""
    stored = file.tensors[name]
    if stored.kind != 0:
        raise UserError(f"{file.path}: {name} is not of float32; use the model's own Hugging Face directory")
    return [_decimal(number) for number in stored.data.reshape(-1).view(np.float32)]


def _decimal(number: float | np.floating[Any]) -> float:
    """The decimal number that a float32 was made of, as the model's own config.json has it."""
    return float(str(np.float32(number)))
