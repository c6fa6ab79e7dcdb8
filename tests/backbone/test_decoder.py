"""The decoder before any weights are loaded: its random start, its dtypes, and what remat and the cache hold."""

import json
from pathlib import Path

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import SIZES, hf_config, logits, random_tokens, whole_rows

from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import FAMILIES, parse_config
from e2p_jax.backbone.layout import DecoderConfig, Execution
from e2p_jax.backbone.weights import abstract


def config(**changes: int | bool) -> DecoderConfig:
    return parse_config({**SIZES, "model_type": "llama", "rms_norm_eps": 1e-5, **changes}, Path("config.json"))


def fresh(dtype: str = "float32", **changes: int | bool) -> Decoder:
    return Decoder(config(**changes), dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


def test_a_fresh_decoder_has_no_opinion() -> None:
    """Random weights give every token about the same probability: a loss near log V."""
    scores = logits(fresh(), *whole_rows(random_tokens(4, 32)))
    entropy = -jnp.sum(jax.nn.softmax(scores) * jax.nn.log_softmax(scores), axis=-1)
    assert float(jnp.mean(entropy)) == pytest.approx(np.log(SIZES["vocab_size"]), abs=0.05)


@pytest.mark.parametrize(
    "family", [*list(FAMILIES)[:3], "gemma3_text", "gpt2", "mixtral", "qwen3_moe", "granite", "phi"]
)
def test_every_family_starts_from_random_weights(family: str) -> None:
    """Without an opinion; a tied head would prefer the last token itself."""
    values = json.loads(hf_config(family, tie_word_embeddings=False).to_json_string())
    c = parse_config(values, Path("config.json"))
    decoder = Decoder(c, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    scores = logits(decoder, *whole_rows(random_tokens(4, 32)))
    entropy = -jnp.sum(jax.nn.softmax(scores) * jax.nn.log_softmax(scores), axis=-1)
    assert float(jnp.mean(entropy)) == pytest.approx(np.log(SIZES["vocab_size"]), abs=0.05)


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 2, "num_key_value_heads": 2}, {}], ids=["square", "grouped"]
)
def test_fresh_attention_is_mimetic(changes: dict[str, int]) -> None:
    """Summed over heads, W_Q' W_K and W_O W_V are near multiples of the identity (Trockman & Kolter, 2023)."""
    c = config(**changes)
    layers = fresh(**changes).layers
    q, k, v = (np.asarray(w[...]) for w in (layers.q, layers.k, layers.v))
    repeats = c.num_heads // c.num_kv_heads

    def for_each_query(w: np.ndarray) -> np.ndarray:
        split = w.reshape(c.num_layers, c.num_kv_heads, c.head_dim, c.hidden_size)
        return np.repeat(split, repeats, axis=1).reshape(c.num_layers, -1, c.hidden_size)

    products = [np.einsum("lid,lie->lde", q, for_each_query(k)), np.asarray(layers.o[...]) @ for_each_query(v)]
    for product in products:
        for layer in product:
            diagonal = np.diag(layer)
            assert diagonal.min() > 0.5 * diagonal.max() > 0
            assert np.abs(layer - np.diag(diagonal)).max() < 0.5 * diagonal.mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes_of_a_fresh_decoder_are_the_abstract_ones(dtype: str) -> None:
    changes: dict[str, int | bool] = {"attention_bias": True, "mlp_bias": True, "head_dim": 12}
    template = nnx.state(abstract(config(**changes), dtype=jnp.dtype(dtype)))
    values = nnx.state(fresh(dtype, **changes))
    assert jax.tree.structure(template) == jax.tree.structure(values)
    assert [x.shape for x in jax.tree.leaves(template)] == [x.shape for x in jax.tree.leaves(values)]
    assert {x.dtype for x in jax.tree.leaves(values)} == {x.dtype for x in jax.tree.leaves(template)}
    assert {x.dtype for x in jax.tree.leaves(values)} == {jnp.dtype(dtype)}


def test_bfloat16_stays_bfloat16_up_to_the_logits() -> None:
    decoder = fresh("bfloat16")
    tokens, positions, segments = whole_rows(random_tokens(1, 8))
    hidden, cache = decoder(decoder.embed(tokens), positions, segments, decoder.empty_cache(1, 8))
    assert {hidden.dtype, *(kept.dtype for kept in cache.kept.values())} == {jnp.dtype("bfloat16")}
    assert decoder.logits(hidden).dtype == jnp.float32


@pytest.mark.parametrize(("family", "products", "named"), [("llama", 3, 5), ("qwen3", 5, 3)])
def test_the_backward_pass_keeps_what_it_reads(
    family: str, products: int, named: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotated queries and keys stand in place of their products, but where a norm's gradient reads these; the residual
    behind attention in place of the output's. With attention's two results and v, gate and up that is all of a layer.
    """
    values = {**SIZES, "model_type": family, "rms_norm_eps": 1e-5, "num_hidden_layers": 1}
    shapes = parse_config(values, Path("config.json"))
    decoder = Decoder(shapes, dtype=jnp.dtype("float32"), execution=Execution(unroll=True), rngs=nnx.Rngs(0))
    tokens, positions, segments = whole_rows(random_tokens(1, 8))
    jax.ad_checkpoint.print_saved_residuals(lambda x: decoder(x, positions, segments)[0], decoder.embed(tokens))
    kept = capsys.readouterr().out
    assert (kept.count("output of dot_general"), kept.count("named 'attention'")) == (products, named)
