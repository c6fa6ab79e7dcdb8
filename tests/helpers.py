"""Small models and batches that the tests of the backbone, the prefix and the train step share."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
import transformers
from flax import nnx
from jax.sharding import Mesh

from e2p_jax.backbone import weights
from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import DecoderConfig, parse_config
from e2p_jax.backbone.layout import PLAIN, Execution
from e2p_jax.backbone.weights import abstract, load
from e2p_jax.config import BackboneConfig, Config, DataConfig, ItemsConfig, MeshConfig, PrefixConfig, TrainConfig
from e2p_jax.datasets import synthetic
from e2p_jax.parallel.mesh import AXES, make_mesh, param_sharding
from e2p_jax.prefix import mlp
from e2p_jax.prefix.model import Batch, PrefixModel
from e2p_jax.prefix.projector import Projector
from e2p_jax.train.run import Run
from e2p_jax.train.setup import build_model, read_inputs
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import save_table

# Head width 16, so that llama3's three frequency bands all occur; a prime vocabulary, so that its axis is told
# apart from every other in compiled code.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
USER_WIDTH = 8


# Heads of 12 plain numbers and 8 rotated ones, and the experts beside them.
LATENTS: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}


# What some families need beside `SIZES`, or call otherwise. Soft caps bite at the logits of these models.
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "phi3": {"hidden_size": 64, "pad_token_id": 0},
    "smollm3": {"pad_token_id": 0, "no_rope_layer_interval": 2},
    "gemma2": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0, "sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    | {"shared_expert_intermediate_size": 40},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24, "sliding_window": 5}
    | {"rope_parameters": {**YARN, "truncate": False}},
    "glm4_moe": {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_group": 3}
    | {"topk_group": 2, "routed_scaling_factor": 2.5},
    "deepseek_v2": LATENTS | {"n_routed_experts": 6, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
    "deepseek_v3": LATENTS | {"n_routed_experts": 12, "num_experts_per_tok": 4, "first_k_dense_replace": 1},
    "glm4_moe_lite": LATENTS | {"n_routed_experts": 6},
    # A norm of what linear attention says, which may be next to nothing: of another epsilon gradients would be noise.
    "qwen3_5_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    | {"linear_value_head_dim": 12, "num_hidden_layers": 2, "full_attention_interval": 2, "rms_norm_eps": 0.01},
    "olmo3": {"sliding_window": 5},
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 4}},
    "granite": {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1}
    | {"logits_scaling": 4.0},
    "glm4": {"pad_token_id": 0},
    "exaone4": {"sliding_window": 5, "sliding_window_pattern": 2},
    "cohere2": {"hidden_size": 64, "sliding_window": 5, "sliding_window_pattern": 2, "logit_scale": 0.25},
    "gpt_neox": {"hidden_size": 64, "num_key_value_heads": None},
    "phi": {"hidden_size": 64},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 256},
}


FAMILY_SIZES["qwen3_next"] = FAMILY_SIZES["qwen3_5_text"] | FAMILY_SIZES["qwen2_moe"]
FAMILY_SIZES["qwen3_5_moe_text"] = FAMILY_SIZES["qwen3_next"]

WRAPPED = {"gemma3": "gemma3_text", "mistral3": "ministral3", "qwen3_5": "qwen3_5_text"}
WRAPPED["qwen3_5_moe"] = "qwen3_5_moe_text"
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VISION |= {"image_size": 16, "patch_size": 8, "head_dim": 4}


def hf_config(family: str = "llama", **changes: Any) -> transformers.PreTrainedConfig:
    """A tiny config of a family of transformers; of a wrapper, `changes` are of its language model."""
    if family in WRAPPED:
        text = hf_config(WRAPPED[family], **changes)
        tied = {"tie_word_embeddings": text.tie_word_embeddings}
        return transformers.AutoConfig.for_model(family, text_config=text, vision_config=VISION, **tied)
    sizes = {} if family == "gpt2" else SIZES
    return transformers.AutoConfig.for_model(family, **{**sizes, **FAMILY_SIZES.get(family, {}), **changes})


def hf_model(config: transformers.PreTrainedConfig, seed: int = 0) -> torch.nn.Module:
    """The transformers model in float32, its weights large enough that no part of it goes unnoticed."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    kind = transformers.AutoModelForCausalLM
    if config.model_type in WRAPPED:
        kind = transformers.AutoModelForImageTextToText
    model = kind.from_config(config, **eager).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        chooses = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
        for name, parameter in [*model.named_parameters(), *chooses]:
            parameter.normal_(0, 0.2, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def hf_logits(model: torch.nn.Module, **inputs: Any) -> np.ndarray:
    """[B, T, V] float32 of a transformers model given NumPy inputs."""
    with torch.no_grad():
        out = model(**{name: torch.tensor(np.array(value)) for name, value in inputs.items()}, use_cache=False)
    return out.logits.float().numpy()


def load_backbone(directory: Path, mesh: Mesh | None = None, **options: Any) -> Decoder:
    """Reads a model directory in float32, onto one device unless a mesh is given."""
    mesh = mesh or mesh_of()
    return load(directory, dtype=jnp.dtype("float32"), sharding=lambda p, s: param_sharding(mesh, p, s), **options)


def mesh_of(**axes: int) -> Mesh:
    """A mesh over the four devices; over the first one where no axis is named."""
    if axes:
        return make_mesh(MeshConfig(**{"data": 1, **axes}))
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


@nnx.jit
def logits(decoder: Decoder, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, T, V] float32 of our decoder."""
    hidden, _ = decoder(decoder.embed(tokens), positions, segment_ids)
    return decoder.logits(hidden)


def whole_rows(tokens: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, positions and segment ids of rows that are one segment each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions), jnp.ones(tokens.shape, jnp.int32)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape, dtype=np.int32)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Greatest absolute difference within `tolerance` of the greatest reference value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    difference, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert difference <= tolerance * scale, f"differs by {difference:.3g} at a scale of {scale:.3g}"


def prefix_model(
    *, num_tokens: int = 1, dropout: float = 0.0, execution: Execution = PLAIN, **changes: Any
) -> PrefixModel:
    """A random backbone with large weights and a calibrated projector."""
    values = {**SIZES, "model_type": "llama", "rms_norm_eps": 1e-5, **changes}
    config: DecoderConfig = parse_config(values, Path("config.json"))
    backbone = abstract(config, dtype=jnp.dtype("float32"), execution=execution)
    rng = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(backbone)):
        values = 0.2 * rng.normal(size=variable.get_value().shape) + ("norm" in path[-1])
        variable.set_value(jnp.asarray(values, jnp.float32))
    projector = Projector(
        mlp.Settings(num_tokens=num_tokens, hidden_size=24, dropout=dropout),
        embedding_width=USER_WIDTH,
        model_width=config.hidden_size,
        rngs=nnx.Rngs(2),
    )
    vectors = np.random.default_rng(3).normal(1.0, 2.0, (64, USER_WIDTH)).astype(np.float32)
    projector.calibrate(*Population.of(vectors), backbone.embedding[...], 1.0)
    return PrefixModel(backbone, projector)


class Segment(NamedTuple):
    """One example: K slots, then tokens; `targets` are the places, slots counted, of the tokens to predict."""

    tokens: list[int]
    targets: list[int]
    vector: np.ndarray  # [E]


def random_segment(rng: np.random.Generator, length: int, num_tokens: int = 1) -> Segment:
    places = range(num_tokens, num_tokens + length)
    targets = sorted(rng.choice(places, size=max(1, length // 3), replace=False).tolist())
    return Segment(rng.integers(1, SIZES["vocab_size"], length).tolist(), targets, rng.normal(1.0, 2.0, USER_WIDTH))


def make_batch(
    rows: Sequence[Sequence[Segment]], *, length: int, targets: int, segments: int, num_tokens: int = 1
) -> Batch:
    """The batch contract written out position by position: slots before everything else of a segment."""
    count = len(rows)
    batch: dict[str, np.ndarray] = {
        name: np.zeros((count, length), np.int32) for name in ("tokens", "positions", "segment_ids")
    }
    batch["slots"] = np.full((count, length), -1, np.int32)
    batch["user_embeddings"] = np.zeros((count, segments, USER_WIDTH), np.float32)
    batch |= {name: np.zeros((count, targets), np.int32) for name in ("target_positions", "target_ids")}
    batch["target_weights"] = np.zeros((count, targets), np.float32)
    for row, members in enumerate(rows):
        place = target = 0
        for number, segment in enumerate(members):
            batch["user_embeddings"][row, number] = segment.vector
            for position, token in enumerate([0] * num_tokens + segment.tokens):
                batch["tokens"][row, place] = token
                batch["positions"][row, place] = position
                batch["segment_ids"][row, place] = number + 1
                if position < num_tokens:
                    batch["slots"][row, place] = number * num_tokens + position
                if position in segment.targets:
                    batch["target_positions"][row, target] = place - 1
                    batch["target_ids"][row, target] = token
                    batch["target_weights"][row, target] = 1.0
                    target += 1
                place += 1
    return Batch(**batch)  # type: ignore[typeddict-item]


def random_batch(seed: int = 0, *, rows: int = 4, length: int = 128, targets: int = 48) -> Batch:
    """Rows of three segments of uneven lengths, with padding after them."""
    rng = np.random.default_rng(seed)
    packed = [[random_segment(rng, int(n)) for n in rng.integers(10, 38, 3)] for _ in range(rows)]
    return make_batch(packed, length=length, targets=targets, segments=3)


def fill(directory: Path, left: int) -> None:
    """Leaves so many bytes free on the disk that a directory is on."""
    free = os.statvfs(directory)
    (directory / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - left))


def untrained_run(
    folder: Path, backbone: Path, placement: str, num_tokens: int, kind: str, items: str | None = None
) -> Run:
    """Three users; the projector, and the head over `items`, are moved off their first values."""
    save_table(
        folder / "table",
        ["user-1", "user-2", "user-3"],
        np.stack([synthetic.vector(user) for user in (1, 2, 3)]),
        name="t",
        version="1",
    )
    config = Config(
        backbone=BackboneConfig(path=str(backbone)),
        data=DataConfig(path="none", embeddings=str(folder / "table"), items=items, seq_len=256),
        items=ItemsConfig(width=8, token=items is not None),
        prefix=PrefixConfig(placement),
        projector=mlp.Settings(kind=kind, num_tokens=num_tokens, hidden_size=16),
        train=TrainConfig(rows=4),
    )
    inputs = read_inputs(config)
    assert inputs.table is not None
    model = build_model(inputs, Population.of(inputs.table.vectors))
    rng = np.random.default_rng(0)

    def moved(part: dict[str, jax.Array]) -> dict[str, jax.Array]:
        learned = [name for name in sorted(part) if not name.endswith(("mean", "std", "given"))]
        noise = {name: 0.3 * rng.normal(size=part[name].shape).astype(np.float32) for name in learned}
        return part | {name: jax.device_put(part[name] + noise[name], part[name].sharding) for name in learned}

    parts = {name: moved(model.params[name]) for name in ("projector", "items") if name in model.params}
    return Run(folder, 0, inputs, dataclasses.replace(model, params=model.params | parts))


def make_backbone(out: Path, family: str, changes: dict[str, Any]) -> Path:
    """A random model of the family with the embedded backbone's tokenizer."""
    sizes = {"vocab_size": 4096, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0}
    hf_model(hf_config(family, **sizes, **changes)).save_pretrained(out)
    for name in weights.COMPANIONS:
        if name not in ("config.json", "generation_config.json") and (weights.EMBEDDED / name).is_file():
            shutil.copyfile(weights.EMBEDDED / name, out / name)
    if family == "gpt2":  # as OpenAI's was published, without its head
        path = out / "model.safetensors"
        tensors = {k.removeprefix("transformer."): v for k, v in safetensors.numpy.load_file(path).items()}
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    return out
