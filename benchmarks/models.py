"""Random Llamas of published shapes, written once as Hugging Face directories that every contender loads."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from e2p_jax.backbone import weights

Shape = Literal["tiny", "41m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"]

LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "41m": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **LLAMA3,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **LLAMA3,
        "rope_parameters": {**LLAMA3["rope_parameters"], "factor": 8.0},
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}


def llama_config(shape: Shape) -> transformers.LlamaConfig:
    """The shape's config; its tokenizer is the embedded backbone's, whose ids are the smallest of each vocabulary."""
    names = json.loads((weights.EMBEDDED / "config.json").read_text())
    ids = {key: names[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in names}
    return transformers.LlamaConfig(**{"max_position_embeddings": 4096, **SHAPES[shape], **ids})


def write_model(shape: Shape, directory: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A transformers model with random weights in `directory`, and the model itself."""
    with torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            llama_config(shape), dtype=dtype, attn_implementation="sdpa"
        )
    model.save_pretrained(directory)
    for name in weights.COMPANIONS:
        if name != "config.json" and (weights.EMBEDDED / name).is_file():
            shutil.copyfile(weights.EMBEDDED / name, directory / name)
    return model.eval().requires_grad_(False)
