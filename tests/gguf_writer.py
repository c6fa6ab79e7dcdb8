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
}
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
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.value_length": config.head_dim if hasattr(config, "head_dim") else None,
        "rope.freq_base": full["rope_theta"],
        "rope.freq_base_swa": local.get("rope_theta"),
    }
    if full["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": full["factor"]}
    if config.model_type in ("gemma2", "gemma3_text", "phi3"):
        values["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
        values["final_logit_softcapping"] = config.final_logit_softcapping
    if config.model_type == "mixtral":
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if config.model_type == "qwen3_moe":
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
        if ours.endswith("experts.gate_up_proj"):  # fused in memory, one for gates and one for ups in files
            layer = ours.split(".")[2]
            gate, up = np.split(tensor, 2, axis=1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            continue
        module, _, suffix = ours.rpartition(".") if ours.endswith((".weight", ".bias")) else (ours, "", "weight")
        if name == "llama" and (".q_proj." in ours or ".k_proj." in ours):
            heads = config.num_attention_heads if ".q_proj." in ours else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if name.startswith("gemma") and ours.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        theirs = names.get_name(module)
        assert theirs is not None, ours
        found[f"{theirs}.{suffix}"] = np.ascontiguousarray(tensor)
    return found
