"""Published models by their config.json: they build, count what was published, split evenly on documented meshes."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_CLASSES

from e2p_jax.backbone.families import FAMILIES, WRAPPERS, parse_config
from e2p_jax.backbone.layout import cache_shapes
from e2p_jax.backbone.weights import abstract
from e2p_jax.parallel.mesh import AXES, param_sharding

LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "Llama-3.1-70B": LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "Qwen3-8B": QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36}
    | {"max_window_layers": 36},
    "Qwen3-32B": QWEN3
    | {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_hidden_layers": 64}
    | {"max_window_layers": 64},
    "Gemma-3-27B text": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 128,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 5376,
        "initializer_range": 0.02,
        "intermediate_size": 21504,
        "max_position_embeddings": 131072,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 168,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000.0,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0.dev0",
        "use_cache": True,
        "vocab_size": 262208,
    },
}
# Smaller ones, with whatever keys their authors left in.
COMMON: dict[str, Any] = {"attention_bias": False, "attention_dropout": 0.0, "rope_scaling": None, "use_cache": True}
GEMMA = COMMON | {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06, "head_dim": 256}
PHI = COMMON | {"model_type": "phi3", "auto_map": {}, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05}
CONFIGS |= {
    "Qwen2.5-0.5B": {"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02}
    | {"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2"}
    | {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06}
    | {"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False}
    | {"use_sliding_window": False, "vocab_size": 151936},
    "Phi-4": PHI
    | {"hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384}
    | {"num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10, "rope_theta": 250000}
    | {"original_max_position_embeddings": 16384, "sliding_window": None, "vocab_size": 100352},
    "Phi-4-mini": PHI
    | {"hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072}
    | {"num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 10000.0}
    | {"original_max_position_embeddings": 4096, "sliding_window": 262144, "vocab_size": 200064}
    | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True, "full_attn_mod": 1, "interpolate_factor": 1}
    | {"lm_head_bias": False, "mlp_bias": False}
    | {"rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"}},
    "SmolLM3-3B": COMMON
    | {"hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536}
    | {"layer_types": ["full_attention"] * 36, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3"}
    | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16}
    | {"num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06}
    | {"rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256},
    "OLMo-2-1124-7B": COMMON
    | {"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096}
    | {"model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32}
    | {"rms_norm_eps": 1e-06, "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352},
    "Gemma-2B": GEMMA
    | {"hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384}
    | {"max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18}
    | {"num_key_value_heads": 1, "rope_theta": 10000.0, "vocab_size": 256000},
    "Gemma-2-2B": GEMMA
    | {"attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0}
    | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304}
    | {"intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8}
    | {"num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rope_theta": 10000.0}
    | {"sliding_window": 4096, "vocab_size": 256000},
    "Gemma-3-1B": GEMMA
    | {"attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None}
    | {"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912}
    | {"max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4}
    | {"num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_theta": 1000000}
    | {"rope_local_base_freq": 10000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144},
    "Qwen3-30B-A3B": QWEN3
    | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "num_hidden_layers": 48, "max_window_layers": 48, "decoder_sparse_step": 1}
    | {"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128}
    | {"num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001},
    "Mixtral-8x7B": {"model_type": "mixtral", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    | {"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336}
    | {"max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32}
    | {"num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05}
    | {"rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False}
    | {"torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000},
    "GPT-2": {"activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1}
    | {"eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2"}
    | {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1}
    | {"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True}
    | {"summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257}
    | {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
}
# Half the bytes that the published indices of the bfloat16 safetensors name; Gemma's, less its image encoder and
# projection (416,866,032 and 6,194,304); GLM's, less the layer behind the last (3,616,573,568 and 5,539,962,272).
# DeepSeek-V3's index counts FP8: as its tensors' headers were counted, less the layer behind the last. Of Qwen3.5 and
# Qwen3-Next what transformers builds of their language models.
PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Gemma-3-27B text": 27_432_406_640 - 416_866_032 - 6_194_304,
    "Qwen2.5-0.5B": 494_032_768,
    "Phi-4": 14_659_507_200,
    "Phi-4-mini": 3_836_021_760,
    "SmolLM3-3B": 3_075_098_624,
    "OLMo-2-1124-7B": 7_298_617_344,
    "Gemma-2B": 2_506_172_416,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-3-1B": 999_885_952,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Mixtral-8x7B": 46_702_792_704,
    "GPT-2": 124_439_808,
}
# More of them: what was published of each family that came later.
MORE = json.loads((Path(__file__).parent / "published.json").read_text())
CONFIGS |= {name: model["config"] for name, model in MORE.items()}
PUBLISHED |= {name: model["parameters"] for name, model in MORE.items()}
# Axes (fsdp, tensor) that docs/backbones.md names for each.
MESHES = {
    "Llama-3.1-8B": [(8, 1), (16, 1), (4, 4)],
    "Llama-3.1-70B": [(32, 1), (64, 1), (16, 8)],
    "Qwen3-8B": [(8, 1), (16, 1), (4, 4)],
    "Qwen3-32B": [(16, 1), (32, 1), (8, 8)],
    "Gemma-3-27B text": [(16, 1), (32, 1), (8, 8)],
    "Qwen3-30B-A3B": [(16, 1), (32, 1), (8, 8)],
    "Mixtral-8x7B": [(16, 1), (32, 1), (8, 8)],
    "GLM-4.5-Air": [(32, 1), (64, 1), (16, 8)],
    "DeepSeek-V2-Lite": [(8, 1), (16, 1), (4, 4)],
    "DeepSeek-V3": [(64, 1), (128, 1), (32, 8)],
    "Mistral-Small-3.1-24B": [(16, 1), (32, 1), (8, 8)],
    "Seed-OSS-36B": [(16, 1), (32, 1), (8, 8)],
    "EXAONE-4.0-32B": [(16, 1), (32, 1), (8, 8)],
    "gpt-oss-20b": [(8, 1), (16, 1), (4, 4)],
    "gpt-oss-120b": [(32, 1), (64, 1), (8, 8)],
    "Qwen3.5-27B": [(16, 1), (32, 1), (8, 4)],
    "Qwen3.5-35B-A3B": [(16, 1), (32, 1), (64, 1)],
    "Qwen3-Next-80B-A3B": [(32, 1), (64, 1), (128, 1)],  # a score of one row splits no other way
}
SMALL = ("norm", "bias", "sinks", "_taps", "_rate")  # what is no matrix


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    config = parse_config(CONFIGS[name], Path(f"{name}/config.json"))
    state = nnx.to_flat_state(nnx.state(abstract(config, dtype=jnp.dtype("bfloat16"))))
    return {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in state}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_parameter_count(name: str) -> None:
    """And every matrix is split over eight devices, whatever the vocabulary."""
    found, mesh = shapes(name), jax.sharding.AbstractMesh((1, 8, 1), AXES)
    assert sum(int(np.prod(shape)) for shape in found.values()) == PUBLISHED[name]
    whole = {path for path, s in found.items() if param_sharding(mesh, f"backbone/{path}", s).shard_shape(s) == s}
    assert {path for path in whole if not path.endswith(SMALL)} <= {"position_embedding"}


def test_a_cache_holds_what_keys_and_values_are_made_of() -> None:
    """Of DeepSeek-V3 a vector and the rotated key that its 128 heads share, as docs/backbones.md says."""
    config = parse_config(CONFIGS["DeepSeek-V3"], Path("config.json"))
    assert sum(math.prod(shape) for shape in cache_shapes(config, 1).values()) == 576
    assert config.num_heads * (config.head_dim + config.value_size) == 40_960


def test_the_table_of_families_says_what_each_was_held_against() -> None:
    """The class of transformers whose outputs it has, and the published models whose parameters it counts."""
    page = Path(__file__).parents[2] / "docs" / "backbones.md"
    before, heading, rest = page.read_text().partition("| `model_type` |")
    table, after = rest.split("\n\n", 1)
    lines, written = table.splitlines(), set()
    for number, line in enumerate(lines[2:], 2):
        family, models, beyond = (cell.strip() for cell in line.strip("|").split("|")[:3])
        name = family.strip("`")
        mapping = CLASSES if name in FAMILIES else IMAGE_CLASSES
        sizes = ", ".join(sorted(size for size, values in CONFIGS.items() if values["model_type"] == name))
        held = f"`{mapping[name]}`" + (f"; {sizes}" if sizes else "")
        lines[number] = f"| {family} | {models} | {beyond} | {held} |"
        written.add(name)
    assert written == FAMILIES.keys() | WRAPPERS.keys()
    made = f"{before}{heading}{chr(10).join(lines)}\n\n{after}"
    if made != page.read_text():
        page.write_text(made)
        raise AssertionError("docs/backbones.md: the table of families was out of date; it is written again, commit it")


@pytest.mark.parametrize("name", MESHES)
def test_every_matrix_is_split_over_all_devices(name: str) -> None:
    """Norms, biases and their like alone are not: less than a thousandth of the model."""
    table = Path(__file__).parents[2] / "docs" / "backbones.md"
    (row,) = [line for line in table.read_text().splitlines() if line.startswith(f"| {name} |") and " GB" in line]
    for fsdp, tensor in MESHES[name]:
        mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), AXES)
        whole = held = 0
        for path, shape in shapes(name).items():
            count = int(np.prod(shape))
            part = int(np.prod(param_sharding(mesh, f"backbone/{path}", shape).shard_shape(shape)))
            assert part * fsdp * tensor == count or path.endswith(SMALL), path
            whole, held = whole + count, held + part
        assert held < whole / (fsdp * tensor) * 1.001 + whole / 1000
        assert f"{fsdp} x {tensor}: {2 * held / 1e9:.2f} GB" in row
