"""Writes transformers' models as GGUF, as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "phi": "phi2",
    "granite": "granite",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "smollm3": "smollm3",
    "arcee": "arcee",
    "seed_oss": "seed_oss",
    "glm4": "glm4",
    "exaone4": "exaone4",
    "cohere2": "cohere2",
    "gpt_oss": "gpt-oss",
}
# Those whose converter is Llama's: queries and keys are brought into the order of Meta's release.
INTERLEAVED = ("llama", "granite", "smollm3", "arcee")
# What `tokenizer.ggml` says of a vocabulary that no text is made of.
VOCABULARY: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["t", "1", *(f"t{i}" for i in range(95))],
    "merges": ["t 1"],
    "eos_token_id": 7,
    "padding_token_id": 0,
}


def write_model(
    path: Path,
    model: torch.nn.Module,
    kind: Kind = Kind.F32,
    keys: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """
    Args:
      kind: of the matrices; norms and biases are F32.
      keys: metadata in place of what the model's config gives; None takes a key out.
      tokenizer: `tokenizer.ggml.*`, and `chat_template`.
      tensors: further ones.
    """
    config = model.config
    name = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, name)
    values = {f"{name}.{key}": value for key, value in metadata(config).items()}
    values |= {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or VOCABULARY).items()}
    if "tokenizer.ggml.chat_template" in values:
        values["tokenizer.chat_template"] = values.pop("tokenizer.ggml.chat_template")
    for key, value in (values | (keys or {})).items():
        if value is not None:
            add(writer, key, value)
    for theirs, tensor in renamed(model, name).items():
        stored = kind if tensor.ndim > 1 else Kind.F32
        writer.add_tensor(theirs, gguf.quantize(tensor, stored), raw_dtype=stored)
    for theirs, tensor in (tensors or {}).items():
        writer.add_tensor(theirs, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def metadata(config: Any) -> dict[str, Any]:
    """Behind the architecture's name."""
    rope = config.rope_parameters
    full, local = (rope[k] for k in ("full_attention", "sliding_attention")) if "full_attention" in rope else (rope, {})
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.value_length": config.head_dim if hasattr(config, "head_dim") else None,
        "rope.freq_base": full["rope_theta"],
        "rope.freq_base_swa": local.get("rope_theta"),
    }
    if full["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": full["factor"]}
    name = config.model_type
    if name in ("cohere2", "phi"):
        values["attention.layer_norm_epsilon"] = config.layer_norm_eps
    else:
        values["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if name in ("gemma2", "gemma3_text", "phi3", "olmo3", "exaone4", "cohere2", "gpt_oss"):
        values["attention.sliding_window"] = config.sliding_window
    if name in ("olmo3", "exaone4") and config.sliding_window:
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    if name in ("glm4", "phi"):
        head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        values["rope.dimension_count"] = int(head * full["partial_rotary_factor"])
    if name == "granite":
        values |= {"attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier}
        values |= {"residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
    if name == "cohere2":
        values |= {"logit_scale": config.logit_scale, "rope.scaling.type": "none"}
    if name == "qwen2_moe":
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if name == "gpt_oss":
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
        values |= {"expert_feed_forward_length": config.intermediate_size}
    if full["rope_type"] == "yarn":
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": full["factor"]}
        values |= {"rope.scaling.original_context_length": full["original_max_position_embeddings"]}
    if config.model_type == "gemma2":
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
        values["final_logit_softcapping"] = config.final_logit_softcapping
    if config.model_type == "mixtral":
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if config.model_type in ("qwen3_moe", "qwen2_moe"):
        values["expert_count"], values["expert_used_count"] = config.num_experts, config.num_experts_per_tok
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    return values


def renamed(model: torch.nn.Module, name: str) -> dict[str, np.ndarray]:
    """llama.cpp's names -> tensors as its converter leaves them."""
    config = model.config
    number = next(n for n, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    for ours, value in model.state_dict().items():
        tensor = value.numpy()
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name == "gpt-oss" and ".experts." in ours:  # [X, in, out], gate and up in turns
            part = "gate_up" if "gate_up" in ours else "down"
            kind, whole = ("bias", tensor) if ours.endswith("_bias") else ("weight", tensor.swapaxes(1, 2))
            each = {"gate": whole[:, ::2], "up": whole[:, 1::2]} if part == "gate_up" else {"down": whole}
            layer = ours.split(".")[2]
            found |= {f"blk.{layer}.ffn_{which}_exps.{kind}": np.ascontiguousarray(x) for which, x in each.items()}
            continue
        if ours.endswith("experts.gate_up_proj"):  # fused in memory, one for gates and one for ups in files
            layer = ours.split(".")[2]
            gate, up = np.split(tensor, 2, axis=1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            continue
        module, _, suffix = ours.rpartition(".") if ours.endswith((".weight", ".bias")) else (ours, "", "weight")
        if name in INTERLEAVED and (".q_proj." in ours or ".k_proj." in ours):
            heads = config.num_attention_heads if ".q_proj." in ours else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if name.startswith("gemma") and ours.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        theirs = names.get_name(module)
        assert theirs is not None, ours
        found[f"{theirs}.{suffix}"] = np.ascontiguousarray(tensor)
    return found
