"""What `backbone.quantization` costs and saves: prints one line of JSON a backbone.

    python benchmarks/quantization.py --users 200

First the embedded backbone: NLL of held-out generated users' replies, with their context in the prompt (`text`) and
without. Then a random Llama (width 768, 12 layers): NLL of random tokens. Both in float32 on one CPU device, with the
bytes of the layers' matrices; of the larger one also those of the projector's train step: its arguments, and its
temporary memory, which holds one layer's matrices in full at a time.
"""

import json
import os
from pathlib import Path
from typing import Any

import tyro

KINDS = ("none", "int8", "int4", "nf4")


def nll(kind: Any, users: int) -> dict[str, float]:
    """Nats a target of the embedded backbone, by condition."""
    import jax
    import numpy as np

    from e2p_jax.config import BackboneConfig, Config, DataConfig
    from e2p_jax.data import synthetic
    from e2p_jax.data.conditions import Population
    from e2p_jax.evaluate.score import pack_conditions, score
    from e2p_jax.train.partition import split
    from e2p_jax.train.setup import build_model, jit_eval_step, read_inputs

    config = Config(backbone=BackboneConfig(quantization=kind), data=DataConfig(seq_len=256))
    inputs = read_inputs(config)
    model = build_model(inputs, np.zeros((2, 8), np.float32))
    trainable, frozen = split(model.params, model.mask)
    nobody = Population(np.zeros(8, np.float32), np.ones(8, np.float32))
    packed, kept, _ = pack_conditions(
        synthetic.records("validation")[:users], ("none", "text"), inputs.encoder, None, nobody
    )
    step, figures = jit_eval_step(model), {"matrix_bytes": matrix_bytes(model.params["backbone"]["layers"])}
    with jax.set_mesh(model.mesh):
        for name, dataset in packed.items():
            scores = score(dataset, kept, lambda batch: step(trainable, frozen, batch), model.mesh, 8)
            figures[f"nll_{name}"] = round(scores.per_target, 4)
    return figures


def matrix_bytes(layers: dict[str, Any]) -> int:
    return sum(value.nbytes for name, value in layers.items() if value.ndim == 3)


def random_llama(kind: Any) -> dict[str, float]:
    """A projector of 64-number vectors in front of a random Llama, and one row of 256 random tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from e2p_jax.backbone.decoder import Decoder
    from e2p_jax.backbone.families import parse_config
    from e2p_jax.backbone.layout import Execution
    from e2p_jax.backbone.weights import quantize_layers
    from e2p_jax.config import MeshConfig, TrainConfig
    from e2p_jax.data.packing import Budget, empty_rows
    from e2p_jax.parallel.mesh import make_mesh
    from e2p_jax.prefix.model import PrefixModel
    from e2p_jax.prefix.projector import Projector
    from e2p_jax.train.partition import trainable_mask
    from e2p_jax.train.setup import Model, initial_state, jit_train_step

    values = {"model_type": "llama", "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048}
    values |= {"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    config = parse_config(values, Path("config.json"))
    backbone = Decoder(config, dtype=jnp.dtype("float32"), execution=Execution(remat=True), rngs=nnx.Rngs(0))
    if kind != "none":
        quantize_layers(backbone, kind)
    projector = Projector(
        embedding_width=64, model_width=768, num_tokens=1, kind="mlp", hidden_size=512, dropout=0.0, rngs=nnx.Rngs(1)
    )
    whole = PrefixModel(backbone, projector)
    graph, state = nnx.split(whole)
    settings = TrainConfig(rows=1)
    mask = trainable_mask(whole, settings.trainable)
    model = Model(make_mesh(MeshConfig()), graph, nnx.to_pure_dict(state), mask, "random")
    batch = empty_rows(1, Budget(256, 128, 1), 64)
    rng = np.random.default_rng(0)
    batch["tokens"][:] = rng.integers(0, 8192, batch["tokens"].shape)
    batch["positions"][:], batch["segment_ids"][:] = np.arange(256), 1
    batch["target_positions"][:] = np.arange(128)
    batch["target_ids"][:], batch["target_weights"][:] = batch["tokens"][:, 1:129], 1
    with jax.set_mesh(model.mesh):
        start, frozen = initial_state(model, settings)
        compiled = jit_train_step(model, settings).lower(start, frozen, batch).compile()
        memory = compiled.memory_analysis()
        _, metrics = compiled(start, frozen, batch)
    return {
        "matrix_bytes": matrix_bytes(model.params["backbone"]["layers"]),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "nll": round(float(metrics.loss), 4),
    }


def main(users: int = 200) -> None:
    """Measures all kinds.

    Args:
      users: Generated users whose replies the embedded backbone is scored on, 200 at most.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, measure in [("embedded", lambda kind: nll(kind, users)), ("random", random_llama)]:
        print(json.dumps({"backbone": name, **{kind: measure(kind) for kind in KINDS}}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
