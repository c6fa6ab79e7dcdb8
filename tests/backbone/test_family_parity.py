"""Families against transformers in float32, on tiny random models.

Operation by operation, as dense families share theirs; what has layers of its own is compiled whole, which costs less.

One run of each family goes through what differs between families: names and shapes of tensors, the forward pass with
vectors at the input, the gradient there, and decoding with a cache.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from helpers import assert_close, hf_config, hf_logits, hf_model, load_backbone, random_tokens, whole_rows
from safetensors.numpy import load_file

from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import read_config
from e2p_jax.backbone.tensor_files import OTHER_MODELS
from e2p_jax.backbone.weights import named_tensors, quantize_layers, save
from e2p_jax.prefix.loss import cross_entropy

MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {},
    "mistral3": {},
    "ministral3": {},
    "granite": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {},
    "exaone4": {},
    "exaone4-unlimited": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "qwen2_moe": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen2_moe-window": {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": True, "qkv_bias": False},
    "gpt_oss": {"swiglu_limit": 0.5, "swiglu_alpha": 1.2},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
    "deepseek_v2": {"q_lora_rank": None},
    "deepseek_v3": {"rms_norm_eps": 1e-3},
    "glm4_moe_lite": {"mlp_layer_types": ["dense", "sparse"]},
    "qwen3_5": {"attention_bias": True, "hidden_act": "gelu"},
    "seed_oss": {"attention_out_bias": True},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}},
    "arcee": {"mlp_bias": True},
    "cohere2": {"attention_bias": True},
    "gpt_neox": {},
    "gpt_neox-sequential": {"use_parallel_residual": False, "attention_bias": False},
    "phi": {"qk_layernorm": True},
}
SLOTS, LENGTH, NEW = (0, 5), 12, 4


@pytest.mark.parametrize("name", MODELS)
def test_a_family_is_what_transformers_makes_of_it(tmp_path: Path, name: str) -> None:
    theirs = hf_model(hf_config(name.split("-")[0], **{"hidden_size": 64, "num_hidden_layers": 2, **MODELS[name]}))
    theirs.save_pretrained(tmp_path)
    ours = load_backbone(tmp_path)
    tokens, positions, segments = whole_rows(random_tokens(1, LENGTH, seed=8))
    with torch.no_grad():
        embedded = theirs.get_input_embeddings()(torch.tensor(np.array(tokens), dtype=torch.long)).numpy()
    special = bool(ours.config.num_experts or ours.config.linear_layers)
    with jax.disable_jit(not special):
        assert_close(ours.embed(tokens), embedded)
        embedded[0, list(SLOTS)] = np.random.default_rng(9).normal(size=(len(SLOTS), embedded.shape[-1]))
        x = jnp.asarray(embedded)

        @nnx.jit
        def score(ours: Decoder, x: jax.Array) -> Any:
            def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
                hidden, _ = ours(x, positions, segments)
                out = ours.before_head(hidden[:, :-1]), ours.output_embedding, tokens[:, 1:]
                nll = cross_entropy(*out, ours.config.logit_cap, ours.output_bias, at_once=1 << 25)
                return jnp.sum(nll), ours.logits(hidden)

            return jax.value_and_grad(loss, has_aux=True)(x)

        (_, scores), gradient = score(ours, x)
        given = torch.tensor(embedded, requires_grad=True)
        expected = theirs(inputs_embeds=given, use_cache=False).logits
        assert_close(scores, expected.detach())
        following = torch.tensor(np.asarray(tokens[:, 1:]), dtype=torch.long)
        torch.nn.functional.cross_entropy(expected[0, :-1], following[0], reduction="sum").backward()
        assert given.grad is not None
        assert_close(gradient, given.grad)
        chosen, cached = decode(ours, x)
        assert chosen == likeliest(theirs, given.detach())
        assert_close(cached, scores, 1e-5)
    held = load_file(tmp_path / "model.safetensors")
    for tensor_name, tensor in named_tensors(ours, held):  # byte for byte, as `e2p convert` gives them back
        np.testing.assert_array_equal(tensor, held.pop(tensor_name))
    assert all(rest.removeprefix("model.").startswith(OTHER_MODELS) for rest in held)
    if special:
        return  # another expert here and there, a norm of next to nothing: tests/backbone/test_quantize.py
    with jax.disable_jit():
        hidden, _ = quantize_layers(ours, "int8")(x, positions, segments)
        assert_close(ours.logits(hidden), scores, 0.1)


def test_a_wrapped_model_is_saved_as_the_language_model_that_it_is(tmp_path: Path) -> None:
    """What a run that trained it exports: nothing is left of the image encoder."""
    theirs = hf_model(hf_config("gemma3"))
    theirs.save_pretrained(tmp_path / "whole")
    save(load_backbone(tmp_path / "whole"), tmp_path / "whole", tmp_path / "saved", jnp.dtype("float32"))
    saved, loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(saved).__name__ == "Gemma3ForCausalLM"
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    ids = random_tokens(1, 12).astype(np.int64)
    assert_close(hf_logits(saved, input_ids=ids), hf_logits(theirs, input_ids=ids), 1e-6)
    assert load_backbone(tmp_path / "saved").config == read_config(tmp_path / "saved")


@torch.no_grad()
def likeliest(model: torch.nn.Module, x: torch.Tensor) -> list[int]:
    """The likeliest tokens after [1, T, D] input embeddings, each from the whole text so far."""
    chosen: list[int] = []
    while len(chosen) < NEW:
        chosen.append(int(model(inputs_embeds=x, use_cache=False).logits[0, -1].argmax()))
        x = torch.cat([x, model.get_input_embeddings()(torch.tensor([chosen[-1:]]))], dim=1)
    return chosen


@nnx.jit
def one_step(decoder: Decoder, x: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """Logits and the cache after more input embeddings."""
    hidden, cache = decoder(x, positions, jnp.ones(positions.shape, jnp.int32), cache)
    return decoder.logits(hidden), cache


def decode(decoder: Decoder, x: jax.Array) -> tuple[list[int], jax.Array]:
    """The likeliest tokens after [1, T, D] input embeddings, one by one, and the logits of those embeddings."""
    cache, chosen, scores = decoder.empty_cache(1, x.shape[1] + NEW), [], []
    for step in range(NEW):
        length = x.shape[1]
        positions = jnp.arange(length, dtype=jnp.int32)[None] + (LENGTH + step - length)
        logits, cache = one_step(decoder, x, positions, cache)
        scores.append(logits)
        chosen.append(int(jnp.argmax(scores[-1][0, -1])))
        x = decoder.embed(jnp.asarray([chosen[-1:]], jnp.int32))
    return chosen, scores[0]
