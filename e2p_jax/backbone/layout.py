"""Lays a decoder out: its config, the shapes of its parameters, and which names they have in files."""

import dataclasses
import itertools
from typing import Literal, NamedTuple

from e2p_jax.backbone.names import NAMES
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
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"]
    windows: tuple[int, ...]
    """Per layer: how many positions back a token sees (itself included); 0 is unlimited."""
    ropes: tuple[Rope, ...] = ()
    """The different rotations of queries and keys; none where positions are learned."""
    layer_ropes: tuple[int, ...] = ()
    """Per layer: which of `ropes`."""
    interleaved: bool = False
    """What a rotation takes together are neighbours (0 and 1, 2 and 3), not numbers half a head apart."""
    query_growth: float = 0.0
    query_period: int = 1
    """Queries are multiplied by 1 + growth * log(1 + floor(position / period)), as in Llama 4."""
    learned_positions: bool = False
    """A vector for each position is added to the input embeddings (GPT-2)."""
    embedding_scale: float = 1.0
    """Factor on token embeddings at the input; what stands in a slot is not multiplied by it (Gemma)."""
    input_scale: float = 1.0
    """Factor on all that enters the first layer, what stands in a slot too (Granite)."""
    residual_scale: float = 1.0
    """Factor on what attention and MLP add to the residual."""
    norm: Literal["rms", "rms_float32", "rms_one_plus", "layer", "layer_unbiased"] = "rms"
    """RMSNorm as in Llama, with the weight applied in float32, that with 1 + weight; LayerNorm with a bias, without."""
    pre_norms: bool = True
    post_norms: bool = False
    """Norms on what attention and MLP read, and on what they add to the residual."""
    parallel: bool = False
    """Attention and MLP read the same residual, and what both say is added to it at once."""
    shared_norm: bool = False
    """They read it through the same norm, attention's."""
    qk_norm: Literal["none", "head", "all", "rotated"] = "none"
    """Norm of queries and keys: none, over each head, over all heads together, or over each head once rotated."""
    gated: bool = True
    """The MLP has a gate: down(activation(gate(x)) * up(x)), else down(activation(up(x)))."""
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 1.0
    """Where there is a limit the MLP is down((up + 1) * gate * sigmoid(alpha * gate)) of a gate of that at most, and up
    within it on both sides (gpt-oss)."""
    num_experts: int = 0
    """Gated MLPs of `intermediate_size` in place of each layer's own; 0 is none."""
    dense_layers: tuple[int, ...] = ()
    dense_size: int = 0
    """Layers, from 0, that have an MLP of this width in place of experts."""
    experts_per_token: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    """What makes weights of an expert's scores. With the sigmoid a learned bias has a say in which are chosen, not in
    their weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    expert_groups: int = 1
    groups_per_token: int = 1
    group_best: int = 2
    """A token's experts are chosen among those of so many groups, the ones whose so many best are best."""
    expert_scale: float = 1.0
    """Factor on what a token's experts say together."""
    shared_size: int = 0
    """Width of a gated MLP that all tokens share beside their experts; 0 is none."""
    shared_gated: bool = False
    """What it says is multiplied by the sigmoid of a score of its own."""
    normalise_topk: bool = False
    """The weights of a token's experts are divided by their sum."""
    latent_size: int = 0
    """Keys and values are made of a vector of so many numbers, see `backbone/latent.py`; 0 is of the hidden state."""
    query_latent_size: int = 0
    """Queries are made of another one; 0 is of the hidden state."""
    shared_key_size: int = 0
    """Numbers of a key that all heads share: those that are rotated."""
    latent_value_size: int = 0
    """Width of a head's values, where they are made of a vector."""
    sinks: bool = False
    """Each head has a score beside those of its keys, which takes its share of the weights and gives nothing."""
    gated_attention: bool = False
    """What a head says is multiplied by the sigmoid of what `q_gate` makes of the same input."""
    linear_layers: tuple[int, ...] = ()
    """Layers, from 0, whose attention is linear: a state in place of keys and values, see `backbone/delta.py`."""
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    """Their heads; each of keys serves as many of values, which lie side by side."""
    linear_taps: int = 0
    """How many positions their convolution sees, the own included."""
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    """Soft caps, cap * tanh(x / cap), of attention scores and logits; 0 is none."""
    logit_scale: float = 1.0
    """Factor on logits."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    """Of experts, where there are any, and of their router."""
    head_bias: bool = False
    naming: str = "llama"
    """Which table of tensor names, of `names.NAMES`."""
    wrapped: bool = False
    """The files hold more than the language model, which is left alone there: an image encoder."""
    further_layers: int = 0
    """The files may hold so many layers behind the last one, which predict later tokens and are left alone."""
    fused_by_head: tuple[str, ...] = ()
    """Parameters of which a tensor holds those of the first head, then those of the second: of a linear layer the first
    head of keys."""
    transposed: bool = False
    """Layer matrices are stored [in, out], as GPT-2's Conv1D keeps them."""
    experts_together: bool = False
    """A tensor holds a layer's experts, [X, in, out], gate and up in turns along out (gpt-oss)."""

    @property
    def value_size(self) -> int:
        """Width of what a head says."""
        return self.latent_value_size or self.head_dim


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the decoder runs: nothing here changes what it computes."""

    remat: bool = False
    """Recompute each layer in the backward pass, its products too."""
    attention: Literal["xla", "splash", "cudnn", "mosaic"] = "xla"
    """Whose attention: plain XLA, the TPU's splash kernel, cuDNN's or tokamax's; see `attention.choose`."""
    sort_tokens: bool = False
    """Tokens are sorted to their experts: a mixture costs what its active experts cost. Not where experts are trained:
    there all tokens go to all of them."""
    logits_at_once: int = 1 << 25
    """Of the loss, float32, on one device: the targets are gone through in chunks of about so many."""
    unroll: bool = False
    """The layers are written out one after the other, not a loop: nothing is copied into and out of stacks over layers,
    and it takes longer to compile."""


PLAIN = Execution()


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Parameters of a layer -> shape: matrices [out, in], norms and biases [out]; those of experts [X, ...].

    Where layers differ, those of all of them: `layers_with` says which has what.
    """
    c = config
    width, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q)}
    if c.latent_size:
        shapes = {
            "q": (q, c.query_latent_size or width),
            "latent": (c.latent_size, width),
            "k_shared": (c.shared_key_size, width),
            "k": (c.num_heads * (c.head_dim - c.shared_key_size), c.latent_size),
            "v": (c.num_heads * c.value_size, c.latent_size),
            "o": (width, c.num_heads * c.value_size),
        }
    if c.query_latent_size:
        shapes["q_latent"] = (c.query_latent_size, width)
    if c.gated_attention:
        shapes["q_gate"] = (q, width)
    if c.linear_layers:
        shapes |= _linear_shapes(c)

    def mlp(size: int) -> dict[str, tuple[int, ...]]:
        gate: dict[str, tuple[int, ...]] = {"gate": (size, width)} if c.gated else {}
        return gate | {"up": (size, width), "down": (width, size)}

    if c.num_experts:
        shapes["router"] = (c.num_experts, width)
        if c.router == "sigmoid":
            shapes["router_choice_bias"] = (c.num_experts,)
        shapes |= {f"expert_{name}": (c.num_experts, *shape) for name, shape in mlp(c.intermediate_size).items()}
        if c.shared_size:
            shapes |= {f"shared_{name}": shape for name, shape in mlp(c.shared_size).items()}
        if c.shared_gated:
            shapes["shared_router"] = (1, width)
    of_mlp = [name for name in shapes if name.startswith(("router", "expert_")) and not name.endswith("_bias")]
    if c.dense_layers or not c.num_experts:
        dense = mlp(c.dense_size if c.num_experts else c.intermediate_size)
        shapes |= dense
        of_mlp += dense
    first = ("q_latent", "latent", "k_shared") if c.latent_size else ("q", "k", "v", "q_gate")
    of_hidden = [name for name in first if name in shapes]
    for names, biased in [(of_hidden, c.qkv_bias), (("o",), c.output_bias), (of_mlp, c.mlp_bias)]:
        if biased:
            shapes |= {f"{name}_bias": shapes[name][:-1] for name in names}
    if c.sinks:
        shapes["sinks"] = (c.num_heads,)
    norms: dict[str, tuple[int, ...]] = {}
    if c.pre_norms:
        norms |= {"attention_norm": (width,)} | ({} if c.shared_norm else {"mlp_norm": (width,)})
    if c.post_norms:
        norms |= {"attention_post_norm": (width,), "mlp_post_norm": (width,)}
    if c.qk_norm in ("head", "rotated"):
        norms |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    if c.qk_norm == "all":
        norms |= {"q_norm": (q,), "k_norm": (kv,)}
    if c.latent_size:
        norms |= {"latent_norm": (c.latent_size,)}
    if c.query_latent_size:
        norms |= {"q_latent_norm": (c.query_latent_size,)}
    if c.norm == "layer":
        norms |= {f"{name}_bias": shape for name, shape in norms.items()}
    return shapes | norms


def _linear_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Of a layer with linear attention: queries, keys, values, the gate of what they say, how much of a value is
    written, how fast the state decays; convolutions are [out, 1, taps].
    """
    keys, values = c.linear_key_heads * c.linear_key_dim, c.linear_value_heads * c.linear_value_dim
    rows = {"q": keys, "k": keys, "v": values, "gate": values, "write": c.linear_value_heads}
    rows["decay"] = c.linear_value_heads
    shapes: dict[str, tuple[int, ...]] = {f"linear_{name}": (count, c.hidden_size) for name, count in rows.items()}
    shapes |= {f"linear_{name}_taps": (rows[name], 1, c.linear_taps) for name in "qkv"}
    return shapes | {
        "linear_step_bias": (c.linear_value_heads,),
        "linear_log_rate": (c.linear_value_heads,),
        "linear_out_norm": (c.linear_value_dim,),
        "linear_o": (c.hidden_size, values),
    }


def matrix_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Those of `layer_shapes` that are matrices: experts' biases have two axes as well."""
    shapes = layer_shapes(config).items()
    return {name: shape for name, shape in shapes if len(shape) > 1 and not name.endswith(("_bias", "_taps"))}


def cache_shapes(config: DecoderConfig, length: int) -> dict[str, tuple[int, ...]]:
    """What a layer keeps of a row's positions, of `length` at most -> shape; `layers_with` says which keeps what."""
    c = config
    kept = (length, c.num_kv_heads, c.head_dim)
    shapes: dict[str, tuple[int, ...]] = {"k": kept, "v": kept}
    if c.latent_size:
        shapes = {"k": (length, 1, c.shared_key_size), "v": (length, 1, c.latent_size)}
    if c.linear_layers:
        repeats = c.linear_value_heads // c.linear_key_heads
        shapes["linear_state"] = (c.linear_key_heads, repeats, c.linear_key_dim, c.linear_value_dim)
        rows = _linear_shapes(c)
        shapes |= {f"linear_{name}_last": (c.linear_taps - 1, rows[f"linear_{name}"][0]) for name in "qkv"}
    return shapes


def layers_with(config: DecoderConfig, name: str) -> list[int]:
    """The layers that have a parameter, quantised or not, or keep something, in order: what it is stacked over."""
    dense = {*config.dense_layers} if config.num_experts else {*range(config.num_layers)}
    if name.startswith("linear_"):
        return list(config.linear_layers)
    if name.split("_")[0] in ("q", "k", "v", "o", "sinks"):
        return [layer for layer in range(config.num_layers) if layer not in config.linear_layers]
    if name.startswith(("router", "expert_", "shared_")):
        return [layer for layer in range(config.num_layers) if layer not in dense]
    if name.startswith(("gate", "up", "down")):
        return sorted(dense)
    return list(range(config.num_layers))


class Run(NamedTuple):
    """Layers in a row that are alike: the decoder scans over them."""

    first: int
    end: int
    config: DecoderConfig
    """That of a decoder which has such layers alone."""


class Period(NamedTuple):
    """Runs that come again and again: the decoder scans over these times."""

    times: int
    runs: list[Run]
    """Of the first time."""

    @property
    def length(self) -> int:
        """Layers, of one time."""
        return self.runs[-1].end - self.runs[0].first


def runs(config: DecoderConfig) -> list[Run]:
    """All layers, in order."""
    dense = dataclasses.replace(config, num_experts=0, dense_layers=())
    kinds = [(layer in config.dense_layers, layer in config.linear_layers) for layer in range(config.num_layers)]
    found = []
    for (is_dense, is_linear), group in itertools.groupby(range(config.num_layers), kinds.__getitem__):
        first, *others = group
        alone = dense if is_dense else config
        alone = alone if is_linear else dataclasses.replace(alone, linear_layers=())
        found.append(Run(first, first + 1 + len(others), alone))
    return found


def periods(config: DecoderConfig) -> list[Period]:
    """All runs, in order: so many as possible in each period that comes more than once."""
    left, found = runs(config), []

    def times(size: int) -> int:
        """That the first runs come in a row."""
        kinds = [(run.end - run.first, run.config) for run in left]
        return next(n for n in itertools.count(1) if kinds[n * size : (n + 1) * size] != kinds[:size])

    while left:
        size = max(range(1, len(left) + 1), key=lambda size: (times(size) > 1, size * times(size), -size))
        size = size if times(size) > 1 else 1
        found.append(Period(times(size), left[:size]))
        left = left[times(size) * size :]
    return found


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
    if config.head_bias:
        paths.append("head_bias")
    modules = NAMES[config.naming]

    def name(path: str) -> str:
        module, bias = modules[path.removesuffix("_bias")], path.endswith("_bias")
        if module.endswith("="):
            return module.removesuffix("=") + ("_bias" if bias else "")
        return f"{module}.{'bias' if bias else 'weight'}"

    return {path: name(path) for path in paths}
