"""Lays a decoder out: its config, the shapes of its parameters, and the names they have in files."""

import dataclasses
from typing import Literal

from e2p_jax.backbone.rope import Rope


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
    tie_head: bool
    attention_scale: float
    """Factor on the product of a query and a key."""
    activation: Literal["silu", "gelu", "gelu_tanh"]
    windows: tuple[int, ...]
    """Per layer: how many positions back a token sees (itself included); 0 is unlimited."""
    ropes: tuple[Rope, ...] = ()
    """The different rotations of queries and keys; none where positions are learned."""
    layer_ropes: tuple[int, ...] = ()
    """Per layer: which of `ropes`."""
    learned_positions: bool = False
    """A vector for each position is added to the input embeddings (GPT-2)."""
    embedding_scale: float = 1.0
    """Factor on token embeddings at the input; what stands in a slot is not multiplied by it."""
    norm: Literal["rms", "rms_float32", "rms_one_plus", "layer"] = "rms"
    """RMSNorm as in Llama, with the weight applied in float32, that with 1 + weight; LayerNorm."""
    pre_norms: bool = True
    post_norms: bool = False
    """Norms on what attention and MLP read, and on what they add to the residual."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Norm of queries and keys: none, over each head, or over all heads together."""
    gated: bool = True
    """The MLP has a gate: down(activation(gate(x)) * up(x)), else down(activation(up(x)))."""
    num_experts: int = 0
    """Gated MLPs of `intermediate_size` in place of each layer's own; 0 is none."""
    experts_per_token: int = 0
    normalise_topk: bool = False
    """The weights of a token's experts are divided by their sum."""
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    """Soft caps, cap * tanh(x / cap), of attention scores and logits; 0 is none."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    naming: Literal["llama", "sandwich", "fused", "gpt2", "mixtral", "qwen3_moe"] = "llama"
    """Which table of tensor names."""
    transposed: bool = False
    """Layer matrices are stored [in, out], as GPT-2's Conv1D keeps them."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the decoder runs: nothing here changes what it computes."""

    remat: bool = False
    """Recompute each layer in the backward pass, its products too."""
    attention: Literal["xla", "splash", "cudnn"] = "xla"
    """Whose attention: plain XLA, the TPU's splash kernel, or cuDNN's; see `attention.choose`."""


PLAIN = Execution()


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Parameters of one layer -> shape: matrices [out, in], those of experts [X, out, in], norms and biases [out]."""
    c = config
    width, q, kv, hidden = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q)}
    mlp = {"gate": (hidden, width)} if c.gated else {}
    mlp |= {"up": (hidden, width), "down": (width, hidden)}
    if c.num_experts:
        shapes["router"] = (c.num_experts, width)
        shapes |= {f"expert_{name}": (c.num_experts, *shape) for name, shape in mlp.items()}
    else:
        shapes |= mlp
    for names, biased in [(("q", "k", "v"), c.qkv_bias), (("o",), c.output_bias), (("gate", "up", "down"), c.mlp_bias)]:
        if biased:
            shapes |= {f"{name}_bias": shapes[name][:1] for name in names if name in shapes}
    norms: dict[str, tuple[int, ...]] = {}
    if c.pre_norms:
        norms |= {"attention_norm": (width,), "mlp_norm": (width,)}
    if c.post_norms:
        norms |= {"attention_post_norm": (width,), "mlp_post_norm": (width,)}
    if c.qk_norm == "head":
        norms |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    if c.qk_norm == "all":
        norms |= {"q_norm": (q,), "k_norm": (kv,)}
    if c.norm == "layer":
        norms |= {f"{name}_bias": shape for name, shape in norms.items()}
    return shapes | norms


_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers/attention_norm": "model.layers.{}.input_layernorm",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    **{f"layers/{name}": f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkvo"},
    **{f"layers/{name}": f"model.layers.{{}}.self_attn.{name}" for name in ("q_norm", "k_norm")},
    **{f"layers/{name}": f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_NAMES: dict[str, dict[str, str]] = {
    "llama": _LLAMA_NAMES,
    "sandwich": _LLAMA_NAMES
    | {
        "layers/attention_post_norm": "model.layers.{}.post_attention_layernorm",
        "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
        "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    "fused": _LLAMA_NAMES
    | {f"layers/{name}": "model.layers.{}.self_attn.qkv_proj" for name in "qkv"}
    | {f"layers/{name}": "model.layers.{}.mlp.gate_up_proj" for name in ("gate", "up")},
    "mixtral": _LLAMA_NAMES
    | {"layers/router": "model.layers.{}.block_sparse_moe.gate"}
    | {
        f"layers/expert_{name}": f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{theirs}"
        for name, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
    "qwen3_moe": _LLAMA_NAMES
    | {"layers/router": "model.layers.{}.mlp.gate"}
    | {f"layers/expert_{name}": f"model.layers.{{}}.mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
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


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Parameter path -> Hugging Face tensor name; `{}` stands for the layer, stacked on axis 0, then for the expert.

    Parameters with the same name are its rows, in this order.
    """
    paths = ["embedding", "final_norm", *(f"layers/{name}" for name in layer_shapes(config))]
    if config.norm == "layer":
        paths.append("final_norm_bias")
    if config.learned_positions:
        paths.append("position_embedding")
    if not config.tie_head:
        paths.append("head")
    modules = _NAMES[config.naming]
    return {
        path: f"{modules[path.removesuffix('_bias')]}.{'bias' if path.endswith('_bias') else 'weight'}"
        for path in paths
    }
