"""What keys of `config.json` mean: sizes, activations, biases, experts, factors. A family names those it has."""

import functools
from typing import Any

from e2p_jax.backbone.config_reader import ACTIVATIONS, Reader
from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.errors import UserError

# Far beyond any model: what is more is a slip or damage, and is refused before anything is built of that size.
MOST_LAYERS, MOST_EXPERTS, MOST_HEAD_DIM = 1000, 4096, 1 << 14


def sizes(
    reader: Reader, fields: dict[str, Any], epsilon: str = "rms_norm_eps", head_key: str | None = "head_dim"
) -> dict[str, Any]:
    """The keys that every family but GPT-2 shares.

    Args:
      epsilon: the key of the norms' epsilon.
      head_key: the key of a head's width; None where it is always the heads' share of the hidden size.
    """
    heads = reader.size("num_attention_heads")
    hidden = reader.size("hidden_size")
    given = head_key is not None and reader.take(head_key, None) is not None
    head_dim = reader.size(head_key, most=MOST_HEAD_DIM) if head_key and given else hidden // heads
    if not given and hidden % heads:
        reader.refuse("num_attention_heads", heads, f"a divisor of hidden_size, {hidden}, where there is no head_dim")
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.size("intermediate_size"),
        "num_layers": reader.size("num_hidden_layers", most=MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": reader.size("num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_positions": reader.size("max_position_embeddings"),
        "norm_epsilon": reader.number(epsilon),
        "attention_scale": head_dim**-0.5,
        "tie_head": reader.flag("tie_word_embeddings", False),
    }


def expert_sizes(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Of a family whose layers all have experts: nothing says the width of another MLP."""
    reader.values.setdefault("intermediate_size", reader.size("moe_intermediate_size"))
    return sizes(reader, fields)


def gpt2_sizes(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = reader.size("n_embd"), reader.size("n_head")
    positions = reader.size("n_positions")
    reader.require("n_ctx", (positions,), positions)
    scaled = reader.flag("scale_attn_weights", True)
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.size("n_inner", 4 * hidden),
        "num_layers": reader.size("n_layer", most=MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_positions": positions,
        "norm_epsilon": reader.number("layer_norm_epsilon"),
        "attention_scale": (hidden // heads) ** -0.5 if scaled else 1.0,
        "tie_head": reader.flag("tie_word_embeddings", True),
        "activation": reader.activation("activation_function"),
    }


def hidden_act(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"activation": reader.activation("hidden_act")}


def gemma_act(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """The first releases say `gelu` and mean its tanh form, as `hidden_activation` came to say."""
    reader.require("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    activation = reader.activation("hidden_act")
    return {"activation": "gelu_tanh" if activation == "gelu" else activation}


def hidden_activation(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Published configs repeat it as `hidden_act`, which transformers does not read here."""
    named = reader.take("hidden_activation")
    reader.require("hidden_act", (named,), named)
    return {"activation": reader.activation("hidden_activation")}


def attention_bias(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    bias = reader.flag("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias}


def qkv_bias(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Here `attention_bias` is not the output's."""
    return {"qkv_bias": reader.flag("attention_bias", False)}


def output_bias(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"output_bias": reader.flag("attention_out_bias", False)}


def mlp_bias(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"mlp_bias": reader.flag("mlp_bias", False)}


def experts(reader: Reader, count: int, normalise: bool) -> dict[str, Any]:
    chosen = reader.size("num_experts_per_tok", least=0)
    if not 1 <= chosen <= count:
        raise UserError(f"{reader.source}: num_experts_per_tok={chosen} of {count} experts (num_local_experts)")
    return {"num_experts": count, "experts_per_token": chosen, "normalise_topk": normalise}


def mixtral_experts(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return experts(reader, reader.size("num_local_experts", most=MOST_EXPERTS), normalise=True)


def gpt_oss_experts(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """A softmax over a token's own is one over all, divided by their sum. Published configs say twice how many."""
    reader.require("hidden_act", ("silu",), "silu")
    read = mixtral_experts(reader, fields)
    reader.require("experts_per_token", (read["experts_per_token"],), read["experts_per_token"])
    factors = {key: reader.number(key) for key in ("swiglu_alpha", "swiglu_limit")}
    return read | factors | {"activation": "silu"}


def beside_dense(fields: dict[str, Any], experts: dict[str, Any], size: int, dense: list[int]) -> dict[str, Any]:
    """Experts of a width in all layers but the dense ones."""
    if not dense:
        return experts | {"intermediate_size": size}
    width = fields["intermediate_size"]
    if len(dense) == fields["num_layers"]:
        return {"intermediate_size": width}
    return experts | {"intermediate_size": size, "dense_layers": tuple(dense), "dense_size": width}


def qwen_experts(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Published configs say `num_experts`, transformers 5 writes `num_local_experts`."""
    step, named = reader.size("decoder_sparse_step"), reader.each("mlp_only_layers", [], int)
    dense = [layer for layer in range(fields["num_layers"]) if layer in named or (layer + 1) % step]
    count = reader.size("num_local_experts", reader.take("num_experts", 128), most=MOST_EXPERTS)
    reader.require("num_experts", (count,), count)
    read = experts(reader, count, reader.flag("norm_topk_prob", False))
    return beside_dense(fields, read, reader.size("moe_intermediate_size"), dense)


def glm_experts(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Layers behind the last one are in the files alone."""
    read = shared_experts(reader, fields, reader.flag("norm_topk_prob"), grouped=True, best=2)
    further = reader.size("num_nextn_predict_layers", least=0, most=MOST_LAYERS)
    return {"router": "sigmoid"} | read | {"further_layers": further}


def glm_lite_experts(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 says of each layer whether it is dense; the first ones are, and published configs say how many."""
    count = fields["num_layers"]
    kinds = reader.each("mlp_layer_types", ["dense", *["sparse"] * (count - 1)], str)
    first = (*kinds, "sparse").index("sparse")
    if kinds != ["dense"] * first + ["sparse"] * (count - first):
        reader.refuse("mlp_layer_types", kinds, f"`dense` for the first layers and `sparse` for the others of {count}")
    reader.require("first_k_dense_replace", (first,), first)
    reader.values["first_k_dense_replace"] = first
    return glm_experts(reader, fields)


def deepseek_v2_experts(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    ways = ("greedy", "group_limited_greedy")
    reader.require("topk_method", ways, None)
    return shared_experts(reader, fields, False, grouped=reader.take("topk_method") == ways[1], best=1)


def shared_experts(
    reader: Reader, fields: dict[str, Any], normalise: bool, *, grouped: bool, best: int
) -> dict[str, Any]:
    """Experts after the first layers, which are dense, beside one that all tokens share.

    Args:
      grouped: whether the groups have a say.
      best: by how many of its experts a group is chosen.
    """
    count = reader.size("n_routed_experts", most=MOST_EXPERTS)
    groups, among = (reader.size(key, 1) for key in ("n_group", "topk_group"))
    if grouped and (count % groups or count < best * groups):
        reader.refuse("n_group", groups, f"a divisor of n_routed_experts, {count}, with {best} experts in each group")
    if grouped and among > groups:
        reader.refuse("topk_group", among, f"at most n_group, {groups}")
    read = experts(reader, count, normalise)
    if grouped and read["experts_per_token"] > count // groups * among:
        reader.refuse("topk_group", among, f"enough groups of {count // groups} for num_experts_per_tok")
    size = reader.size("moe_intermediate_size")
    read |= {"expert_groups": groups, "groups_per_token": among, "group_best": best} if grouped else {}
    read |= {
        "expert_scale": reader.number("routed_scaling_factor"),
        "shared_size": size * reader.size("n_shared_experts", most=MOST_EXPERTS),
    }
    first = min(reader.size("first_k_dense_replace", least=0), fields["num_layers"])
    return beside_dense(fields, read, size, list(range(first)))


def granite_factors(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_scale": reader.number("embedding_multiplier"),
        "residual_scale": reader.number("residual_multiplier"),
        "attention_scale": reader.number("attention_multiplier"),
        "logit_scale": 1 / reader.number("logits_scaling"),
    }


def logit_scale(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"logit_scale": reader.number("logit_scale")}


def parallel_residual(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"parallel": reader.flag("use_parallel_residual", True)}


def head_norm(reader: Reader, fields: dict[str, Any], key: str = "qk_layernorm") -> dict[str, Any]:
    return {"qk_norm": "head" if reader.flag(key, False) else "none"}


glm_qk_norm = functools.partial(head_norm, key="use_qk_norm")


def qwen2_experts(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    shared = reader.size("shared_expert_intermediate_size")
    return qwen_experts(reader, fields) | {"shared_size": shared, "shared_gated": True}


def qwen3_5_experts(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """In every layer, a token's weights divided by their sum."""
    for key, value in (("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        reader.require(key, (value,), value)
    return qwen2_experts(reader, fields)


# What linear attention makes of a layer's input.
LINEAR_INPUTS = tuple(f"linear_{name}" for name in ("q", "k", "v", "gate", "write", "decay"))


def linear_heads(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    keys, values = (reader.size(f"linear_num_{kind}_heads", most=MOST_HEAD_DIM) for kind in ("key", "value"))
    if values % keys:
        reader.refuse("linear_num_value_heads", values, f"a multiple of linear_num_key_heads, {keys}")
    return {
        "linear_key_heads": keys,
        "linear_value_heads": values,
        "linear_key_dim": reader.size("linear_key_head_dim", most=MOST_HEAD_DIM),
        "linear_value_dim": reader.size("linear_value_head_dim", most=MOST_HEAD_DIM),
        "linear_taps": reader.size("linear_conv_kernel_dim", least=2, most=MOST_HEAD_DIM),
    }


def stated_qkv_bias(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": reader.flag("qkv_bias", True)}


def query_scalar(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"attention_scale": reader.number("query_pre_attn_scalar") ** -0.5}


def gemma_embedding(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"embedding_scale": fields["hidden_size"] ** 0.5}


def gemma2_caps(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_cap": reader.number("attn_logit_softcapping", 0.0, zero=True),
        "logit_cap": reader.number("final_logit_softcapping", 0.0, zero=True),
    }


def gemma3_cap(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """The key for attention scores exists here as well, but transformers caps nothing by it."""
    reader.require("attn_logit_softcapping", (None,), None)
    return {"logit_cap": reader.number("final_logit_softcapping", 0.0, zero=True)}


def own_values(config: DecoderConfig) -> dict[str, Any]:
    """Gives what keys may say that the family does not read: what it does anyway. Null says it too."""
    c = config
    (window, *others) = sorted({*c.windows} - {0}) or [0]
    kinds = ["sliding_attention" if window else "full_attention" for window in c.windows]
    off = (
        *("is_encoder_decoder", "add_cross_attention", "is_decoder", "rope_interleaved", "use_mrope"),
        *("use_bidirectional_attention", "scale_attn_by_inverse_layer_idx", "router_jitter_noise"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "n_shared_experts",
    )
    return dict.fromkeys(off, False) | {
        "lm_head_bias": c.head_bias,
        "pruned_heads": {},
        "layer_types": kinds,
        "sliding_window": None if others else window,
        "sliding_window_size": None if others else window,
        "use_sliding_window": bool(window),
        "qkv_bias": c.qkv_bias,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "use_qk_norm": c.qk_norm != "none",
        "qk_layernorm": c.qk_norm != "none",
        "head_dim": c.head_dim,
        "attention_head_dim": c.head_dim,
        "num_key_value_heads": c.num_kv_heads,
        "num_experts": c.num_experts,
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "shared_expert_intermediate_size": c.shared_size,
        "partial_rotary_factor": 2 * len(c.ropes[0].frequencies) / c.head_dim if c.ropes else None,
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
        "tie_word_embeddings": c.tie_head,
        "hidden_act": next(name for name, kind in ACTIVATIONS.items() if kind == c.activation),
    }
