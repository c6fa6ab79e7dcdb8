"""The decoder against transformers in float32, on tiny random models of every supported family."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import (
    LLAMA3,
    USER_WIDTH,
    assert_close,
    hf_config,
    hf_logits,
    hf_model,
    load_backbone,
    logits,
    random_tokens,
    whole_rows,
)

from e2p_jax.backbone.decoder import Cache, Decoder
from e2p_jax.backbone.weights import load
from e2p_jax.prefix import linear
from e2p_jax.prefix.loss import cross_entropy
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.prefix.projector import Projector

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama-grouped-queries": {},
    "llama-one-query-a-key": {"num_key_value_heads": 4},
    "llama-one-key": {"num_key_value_heads": 1},
    "llama-tied-head": {"tie_word_embeddings": True},
    "llama-attention-bias": {"attention_bias": True},
    "llama-mlp-bias": {"mlp_bias": True},
    "llama-head-width-of-its-own": {"head_dim": 12},
    "llama-head-width-by-default": {"head_dim": None},
    "llama-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "llama-rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    "llama-rope-llama3": {"rope_parameters": LLAMA3},
    "llama-norm-epsilon": {"rms_norm_eps": 0.3},
    "mistral-window": {"family": "mistral", "sliding_window": 5},
    "mistral-unlimited": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen2-window-in-late-layers": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2-window-unused": {
        "family": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "llama-rope-dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
    "llama-rope-yarn": {"rope_parameters": YARN},
    "llama-rope-yarn-scaled": {"rope_parameters": {**YARN, "attention_factor": 1.7, "truncate": False}},
    "llama-rope-yarn-mscale": {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5, "beta_fast": 4.0}},
    "llama-activation": {"hidden_act": "gelu"},
    "qwen3": {"family": "qwen3"},
    "qwen3-bias-and-window": {
        "family": "qwen3",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "phi3": {"family": "phi3"},
    "phi3-partial-rotary-window": {
        "family": "phi3",
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
        "sliding_window": 5,
    },
    "phi3-longrope": {
        "family": "phi3",
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 3.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        },
    },
    "smollm3": {"family": "smollm3"},
    "smollm3-nope-list-window-bias": {
        "family": "smollm3",
        "no_rope_layers": [0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "olmo2": {"family": "olmo2"},
    "olmo2-bias-tied-theta": {
        "family": "olmo2",
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "gemma": {"family": "gemma"},
    "gemma-untied-bias": {"family": "gemma", "attention_bias": True, "tie_word_embeddings": False},
    "gemma2": {"family": "gemma2"},
    "gemma2-uncapped-other-scale": {
        "family": "gemma2",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 64,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "gemma3": {"family": "gemma3_text"},
    "gemma3-long-capped-other-pattern": {
        "family": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 64,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "mixtral": {"family": "mixtral"},
    "mixtral-one-expert-a-token-window": {"family": "mixtral", "num_experts_per_tok": 1, "sliding_window": 5},
    "qwen3-moe": {"family": "qwen3_moe"},
    "qwen3-moe-normalised-bias-window": {
        "family": "qwen3_moe",
        "norm_topk_prob": True,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "qwen3-next-periods": {"family": "qwen3_next", "num_hidden_layers": 4, "mlp_only_layers": [1, 3]},
    "qwen3.5-moe": {"family": "qwen3_5_moe_text"},
    "gpt2": {"family": "gpt2"},
    "gpt2-untied-unscaled": {
        "family": "gpt2",
        "tie_word_embeddings": False,
        "scale_attn_weights": False,
        "n_inner": None,
        "activation_function": "gelu",
    },
}
# What the attention mask, the positions and the cache can get wrong differs only between these.
MASKS = (
    *("llama-rope-llama3", "mistral-window", "qwen2-window-in-late-layers", "phi3-longrope"),
    *("smollm3-nope-list-window-bias", "olmo2", "gemma2", "gemma3-long-capped-other-pattern", "gpt2"),
    *("mixtral", "qwen3-moe-normalised-bias-window", "qwen3-next-periods"),
)
SLOTS = (
    *("llama-grouped-queries", "llama-tied-head", "mistral-window", "qwen2", "qwen3", "phi3", "smollm3"),
    *("olmo2", "gemma", "gemma2", "gemma3", "gpt2", "mixtral", "qwen3-moe"),
)


class Pair(NamedTuple):
    theirs: torch.nn.Module
    ours: Decoder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> the transformers model and ours, loaded from what it saved."""
    built: dict[str, Pair] = {}

    def build(name: str) -> Pair:
        if name not in built:
            directory = tmp_path_factory.mktemp(name)
            theirs = hf_model(hf_config(**MODELS[name]))
            theirs.save_pretrained(directory)
            built[name] = Pair(theirs, load_backbone(directory))
        return built[name]

    return build


SHAPE = (2, 24)  # of whatever is read at once, so that one program reads it all


@nnx.jit
def read(decoder: Decoder, x: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, T, V] after input embeddings."""
    hidden, _ = decoder(x, positions, segments)
    return decoder.logits(hidden)


def read_tokens(decoder: Decoder, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> jax.Array:
    integers = (jnp.asarray(values, jnp.int32) for values in (tokens, positions, segments))
    tokens, positions, segments = integers
    assert tokens.shape == SHAPE
    return read(decoder, decoder.embed(tokens), positions, segments)


@pytest.mark.parametrize("name", MODELS)
def test_logits(pairs: Any, name: str) -> None:
    theirs, ours = pairs(name)
    tokens = random_tokens(*SHAPE)
    assert_close(read_tokens(ours, *whole_rows(tokens)), hf_logits(theirs, input_ids=tokens.astype(np.int64)))


@pytest.mark.parametrize("name", SLOTS)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path: Path, name: str) -> None:
    """Root mean square error of the logits within 1.1 x that of transformers in bfloat16: casts stand where its do."""
    theirs = hf_model(hf_config(**MODELS[name])).bfloat16()
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(4, 24)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ours = load(tmp_path, dtype=jnp.dtype("bfloat16"), sharding=lambda path, shape: place)
    half = hf_logits(theirs, input_ids=tokens.astype(np.int64))
    exact = hf_logits(theirs.float(), input_ids=tokens.astype(np.int64))

    def error(scores: Any) -> float:
        return float(np.sqrt(np.mean((np.asarray(scores) - exact) ** 2)))

    assert 0 < error(logits(ours, *whole_rows(tokens))) < 1.1 * error(half)


@pytest.mark.parametrize("name", MASKS)
def test_two_packed_segments_are_two_texts(pairs: Any, name: str) -> None:
    """In either order, and padding after them."""
    theirs, ours = pairs(name)
    texts = random_tokens(1, 11, seed=1), random_tokens(1, 9, seed=2)
    alone = [hf_logits(theirs, input_ids=text.astype(np.int64)) for text in texts]
    padding = np.zeros((1, 4), np.int32)
    tokens = np.concatenate([np.concatenate([*order, padding], axis=1) for order in (texts, texts[::-1])])
    positions = [[*range(a), *range(b), *[0] * 4] for a, b in ((11, 9), (9, 11))]
    segments = [np.repeat([1, 2, 0], [a, b, 4]) for a, b in ((11, 9), (9, 11))]
    packed = read_tokens(ours, tokens, np.array(positions), np.array(segments))
    assert_close(packed[:1, :11], alone[0])
    assert_close(packed[:1, 11:20], alone[1])
    assert_close(packed[1:, :9], alone[1])
    assert_close(packed[1:, 9:20], alone[0])


@pytest.mark.parametrize("name", MASKS)
def test_left_padded_rows(pairs: Any, name: str) -> None:
    theirs, ours = pairs(name)
    tokens = random_tokens(*SHAPE, seed=3)
    present = np.arange(SHAPE[1])[None] >= np.array([[0], [5]])
    positions = np.maximum(np.cumsum(present, axis=1) - 1, 0)
    padded = read_tokens(ours, tokens, positions, present)
    reference = hf_logits(
        theirs, input_ids=tokens.astype(np.int64), attention_mask=present.astype(np.int64), position_ids=positions
    )
    assert_close(np.asarray(padded)[present], reference[present])
    assert_close(padded[1:, 5:], hf_logits(theirs, input_ids=tokens[1:, 5:].astype(np.int64)))


@nnx.jit
def extend(
    decoder: Decoder, tokens: jax.Array, positions: jax.Array, segments: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    hidden, cache = decoder(decoder.embed(tokens), positions, segments, cache)
    return decoder.logits(hidden), cache


@pytest.mark.parametrize("name", MASKS)
def test_prefill_and_decoding_one_by_one(pairs: Any, name: str) -> None:
    """Two rows, one left-padded by 3, prefilled with 8 positions and continued by 9 in a cache of 20."""
    theirs, ours = pairs(name)
    padding, prompt, length = np.array([[0], [3]]), 8, 17
    tokens = random_tokens(2, length, seed=4)
    present = (np.arange(length)[None] >= padding).astype(np.int32)
    positions = np.maximum(np.arange(length, dtype=np.int32)[None] - padding.astype(np.int32), 0)
    cache, steps = ours.empty_cache(2, 20), []
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, length))]:
        columns = slice(start, end)
        step, cache = extend(ours, tokens[:, columns], positions[:, columns], present[:, columns], cache)
        steps.append(step)
    decoded = np.concatenate(steps, axis=1)
    assert int(cache.filled) == length
    for row, skip in enumerate(padding[:, 0]):
        alone = hf_logits(theirs, input_ids=tokens[row : row + 1, skip:].astype(np.int64))
        assert_close(decoded[row : row + 1, skip:], alone)


@pytest.mark.parametrize("name", SLOTS)
def test_slots_are_the_given_input_embeddings(pairs: Any, name: str) -> None:
    """Two soft tokens per user, two users in a row: transformers sees the same vectors as `inputs_embeds`."""
    theirs, ours = pairs(name)
    projector = Projector(
        linear.Settings(num_tokens=2),
        embedding_width=USER_WIDTH,
        model_width=ours.config.hidden_size,
        rngs=nnx.Rngs(0),
    )
    model = PrefixModel(ours, projector)
    tokens = random_tokens(*SHAPE, seed=5)
    vectors = np.random.default_rng(6).normal(size=(2, 2, USER_WIDTH)).astype(np.float32)
    segments = np.array([np.repeat([1, 2], [9, 15])] * 2, np.int32)
    positions = np.array([[*range(9), *range(15)]] * 2, np.int32)
    slots = np.full(SHAPE, -1, np.int32)
    slots[:, [0, 1, 12, 13]] = [0, 1, 2, 3]  # before the first text, inside the second
    x = model.embed(jnp.asarray(tokens), jnp.asarray(slots), jnp.asarray(vectors))
    scores = read(ours, x, jnp.asarray(positions), jnp.asarray(segments))

    soft = vectors @ np.asarray(projector.skip[...])  # [2, 2, 2 * D]: a fresh linear projector is one matrix
    with torch.no_grad():
        expected = theirs.get_input_embeddings()(torch.tensor(tokens)).numpy()  # scaled, where the family does
    expected[:, [0, 1, 12, 13]] = soft.reshape(2, 4, -1)
    for start, end in [(0, 9), (9, 24)]:
        reference = hf_logits(theirs, inputs_embeds=expected[:, start:end])
        assert_close(scores[:, start:end], reference)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gemma2", "gpt2"])
def test_gradient_of_what_stands_at_the_input(pairs: Any, name: str) -> None:
    """All that a projector learns from: back through loss, norms and attention, caps, routers and experts."""
    theirs, ours = pairs(name)
    tokens, positions, segments = whole_rows(random_tokens(2, 12, seed=8))
    x = ours.embed(tokens)

    @nnx.jit
    def gradient(ours: Decoder, x: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            hidden, _ = ours(x, positions, segments)
            cap = ours.config.logit_cap
            nll = cross_entropy(hidden[:, :-1], ours.output_embedding, tokens[:, 1:], cap, at_once=1 << 25)
            return jnp.sum(nll)

        return jax.grad(loss)(x)

    given = torch.tensor(np.asarray(x), requires_grad=True)
    scores = theirs(inputs_embeds=given, use_cache=False).logits[:, :-1]
    following = torch.tensor(np.asarray(tokens[:, 1:]), dtype=torch.long)
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="sum").backward()
    assert given.grad is not None
    assert_close(gradient(ours, x), given.grad)
