"""The names that a decoder's parameters have in files: a table a kind, from our paths to modules of transformers.

`{}` stands for the layer, then for the expert. Parameters with the same name are its rows, in the layout's order.
`=` at the end: a tensor of this name itself, and `<name>_bias`, in place of a module's `weight` and `bias`.
"""

# What ends the names of tensors that stay in float32: a bias by which a router chooses, the rates of linear attention.
EXACT = (".e_score_correction_bias", ".linear_attn.A_log", ".linear_attn.dt_bias")

_LLAMA = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers/attention_norm": "model.layers.{}.input_layernorm",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    **{f"layers/{name}": f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkvo"},
    **{f"layers/{name}": f"model.layers.{{}}.self_attn.{name}" for name in ("q_norm", "k_norm")},
    **{f"layers/{name}": f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_MLP = ("gate", "up", "down")
_EXPERTS = (
    _LLAMA
    | {"layers/router": "model.layers.{}.mlp.gate"}
    | {f"layers/expert_{name}": f"model.layers.{{}}.mlp.experts.{{}}.{name}_proj" for name in _MLP}
)
_GLM = (
    _EXPERTS
    | {"layers/router_choice": "model.layers.{}.mlp.gate.e_score_correction="}
    | {f"layers/shared_{name}": f"model.layers.{{}}.mlp.shared_experts.{name}_proj" for name in _MLP}
)
_DEEPSEEK = (
    _GLM
    | {f"layers/{name}": "model.layers.{}.self_attn.kv_a_proj_with_mqa" for name in ("latent", "k_shared")}
    | {f"layers/{name}": "model.layers.{}.self_attn.kv_b_proj" for name in "kv"}
    | {"layers/latent_norm": "model.layers.{}.self_attn.kv_a_layernorm"}
)
_SHARED_EXPERT = {
    "layers/shared_router": "model.layers.{}.mlp.shared_expert_gate",
    **{f"layers/shared_{name}": f"model.layers.{{}}.mlp.shared_expert.{name}_proj" for name in _MLP},
}
# Of linear attention and of the gate of attention beside it.
_DELTA = {
    "layers/q_gate": "model.layers.{}.self_attn.q_proj",
    **{f"layers/linear_{name}": "model.layers.{}.linear_attn.in_proj_qkv" for name in "qkv"},
    "layers/linear_gate": "model.layers.{}.linear_attn.in_proj_z",
    "layers/linear_write": "model.layers.{}.linear_attn.in_proj_b",
    "layers/linear_decay": "model.layers.{}.linear_attn.in_proj_a",
    **{f"layers/linear_{name}_taps": "model.layers.{}.linear_attn.conv1d" for name in "qkv"},
    "layers/linear_step": "model.layers.{}.linear_attn.dt=",
    "layers/linear_log_rate": "model.layers.{}.linear_attn.A_log=",
    "layers/linear_out_norm": "model.layers.{}.linear_attn.norm",
    "layers/linear_o": "model.layers.{}.linear_attn.out_proj",
}
NAMES: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen3_5": _LLAMA | _DELTA,
    "qwen3_5_moe": _EXPERTS | _SHARED_EXPERT | _DELTA,
    "qwen3_next": _EXPERTS
    | _SHARED_EXPERT
    | _DELTA
    | {f"layers/linear_{name}": "model.layers.{}.linear_attn.in_proj_qkvz" for name in ("q", "k", "v", "gate")}
    | {f"layers/linear_{name}": "model.layers.{}.linear_attn.in_proj_ba" for name in ("write", "decay")},
    "sandwich": _LLAMA
    | {
        "layers/attention_post_norm": "model.layers.{}.post_attention_layernorm",
        "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
        "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    "fused": _LLAMA
    | {f"layers/{name}": "model.layers.{}.self_attn.qkv_proj" for name in "qkv"}
    | {f"layers/{name}": "model.layers.{}.mlp.gate_up_proj" for name in ("gate", "up")},
    "mixtral": _LLAMA
    | {"layers/router": "model.layers.{}.block_sparse_moe.gate"}
    | {
        f"layers/expert_{name}": f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{theirs}"
        for name, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
    "qwen3_moe": _EXPERTS,
    "qwen2_moe": _EXPERTS | _SHARED_EXPERT,
    "glm4_moe": _GLM,
    "deepseek": _DEEPSEEK,
    "deepseek_latent": _DEEPSEEK
    | {"layers/q_latent": "model.layers.{}.self_attn.q_a_proj", "layers/q": "model.layers.{}.self_attn.q_b_proj"}
    | {"layers/q_latent_norm": "model.layers.{}.self_attn.q_a_layernorm"},
    "gpt_oss": _LLAMA
    | {"layers/router": "model.layers.{}.mlp.router", "layers/sinks": "model.layers.{}.self_attn.sinks="}
    | {f"layers/expert_{name}": "model.layers.{}.mlp.experts.gate_up_proj=" for name in ("gate", "up")}
    | {"layers/expert_down": "model.layers.{}.mlp.experts.down_proj="},
    "glm4": _LLAMA
    | {
        "layers/attention_post_norm": "model.layers.{}.post_self_attn_layernorm",
        "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
        "layers/mlp_post_norm": "model.layers.{}.post_mlp_layernorm",
    }
    | {f"layers/{name}": "model.layers.{}.mlp.gate_up_proj" for name in ("gate", "up")},
    "hunyuan": _LLAMA
    | {f"layers/{name[0]}_norm": f"model.layers.{{}}.self_attn.{name}_layernorm" for name in ("query", "key")},
    "phi": _LLAMA
    | {
        "final_norm": "model.final_layernorm",
        "layers/o": "model.layers.{}.self_attn.dense",
        "layers/up": "model.layers.{}.mlp.fc1",
        "layers/down": "model.layers.{}.mlp.fc2",
    }
    | {f"layers/{name}_norm": f"model.layers.{{}}.self_attn.{name}_layernorm" for name in "qk"},
    "gpt_neox": {
        "embedding": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "layers/attention_norm": "gpt_neox.layers.{}.input_layernorm",
        **{f"layers/{name}": "gpt_neox.layers.{}.attention.query_key_value" for name in "qkv"},
        "layers/o": "gpt_neox.layers.{}.attention.dense",
        "layers/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "layers/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "layers/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    },
    "gpt2": {
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
        "layers/attention_norm": "transformer.h.{}.ln_1",
        **{f"layers/{name}": "transformer.h.{}.attn.c_attn" for name in "qkv"},
        "layers/o": "transformer.h.{}.attn.c_proj",
        "layers/mlp_norm": "transformer.h.{}.ln_2",
        "layers/up": "transformer.h.{}.mlp.c_fc",
        "layers/down": "transformer.h.{}.mlp.c_proj",
    },
}
