"""Low-rank adapters against PEFT's, and merged into the weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import assert_close, hf_config, hf_logits, hf_model, load_backbone, random_tokens, whole_rows
from peft import LoraConfig, get_peft_model

from e2p_jax.backbone.adapter import Adapter, by_matrix, merge
from e2p_jax.backbone.families import parse_config
from e2p_jax.backbone.lora import Settings

RANK = 3
MODULES = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"} | {
    name: f"self_attn.{name}_proj" for name in "qkvo"
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    hf_model(hf_config("llama")).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_and_their_router_have_no_adapters(family: str) -> None:
    """Nor have experts' biases, which are stacked as a matrix's rows are."""
    config = parse_config(json.loads(hf_config(family).to_json_string()), Path("config.json"))
    adapters = nnx.to_pure_dict(nnx.state(Adapter(config, Settings(rank=RANK), rngs=nnx.Rngs(0))))
    assert adapters.keys() == {f"{name}_lora_{part}" for name in "qkvo" for part in ("in", "out")}


def test_adapters_where_dense_layers_and_experts_are_mixed(tmp_path: Path) -> None:
    """Each stands where its matrix does, those of latents too; beside the weights it does what it does merged."""
    hf_model(hf_config("deepseek_v3")).save_pretrained(tmp_path)
    decoder = load_backbone(tmp_path)
    rng, fresh = np.random.default_rng(1), Adapter(decoder.config, Settings(rank=RANK), rngs=nnx.Rngs(0))
    adapters = jax.tree.map(
        lambda a: jnp.asarray(0.2 * rng.normal(size=a.shape), jnp.float32), nnx.to_pure_dict(nnx.state(fresh))
    )
    held = {name.removesuffix("_lora_in"): len(value) for name, value in adapters.items() if name.endswith("_in")}
    mlp = ("gate", "up", "down")
    latents = dict.fromkeys((*"qkvo", "q_latent", "latent", "k_shared"), 3)
    assert held == latents | dict.fromkeys(mlp, 1) | {f"shared_{name}": 2 for name in mlp}
    inputs, beside = whole_rows(random_tokens(1, 8)), by_matrix("lora", adapters)

    @nnx.jit
    def hidden(decoder, adapters):
        return decoder(decoder.embed(inputs[0]), *inputs[1:], adapters=adapters)[0]

    expected, plain = hidden(decoder, beside), hidden(decoder, None)
    nnx.update(decoder.layers, merge(nnx.to_pure_dict(nnx.state(decoder.layers)), beside))
    assert_close(hidden(decoder, None), expected)
    assert np.abs(np.asarray(plain - expected)).max() > 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_equals_peft(folder: Path) -> None:
    """Every matrix adapted, A and B random: the same logits, from adapters beside the weights and merged into them."""
    decoder = load_backbone(folder)
    lora = Adapter(decoder.config, Settings(rank=RANK), rngs=nnx.Rngs(0))
    tokens, positions, segments = whole_rows(random_tokens(2, 24))

    @nnx.jit
    def logits(decoder, adapters):
        hidden, _ = decoder(
            decoder.embed(tokens), positions, segments, adapters=adapters and by_matrix("lora", adapters)
        )
        return decoder.logits(hidden)

    adapters = nnx.to_pure_dict(nnx.state(lora))
    plain = hf_model(hf_config("llama"))
    assert_close(logits(decoder, adapters), hf_logits(plain, input_ids=np.asarray(tokens)))  # B is zero
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda a: jnp.asarray(0.2 * rng.normal(size=a.shape), jnp.float32), adapters)
    names = [module.split(".")[1] for module in MODULES.values()]
    theirs = get_peft_model(plain, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)).eval()
    with torch.no_grad():
        for layer, block in enumerate(theirs.base_model.model.model.layers):
            for name, module in MODULES.items():
                matrix = block.get_submodule(module)
                matrix.lora_A["default"].weight.copy_(torch.tensor(np.array(adapters[f"{name}_lora_in"][layer])))
                matrix.lora_B["default"].weight.copy_(torch.tensor(np.array(adapters[f"{name}_lora_out"][layer])))
    expected = hf_logits(theirs, input_ids=np.asarray(tokens))
    assert np.abs(expected - np.asarray(logits(decoder, None))).max() > 1
    assert_close(logits(decoder, adapters), expected)
    layers = merge(nnx.to_pure_dict(nnx.state(decoder.layers)), by_matrix("lora", adapters))
    nnx.update(decoder.layers, layers)
    assert_close(logits(decoder, None), expected)
