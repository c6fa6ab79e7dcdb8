"""What `backbone.quantization` costs and saves: prints one line of JSON a backbone.

    python benchmarks/quantization.py --users 200

First the embedded backbone: NLL of held-out generated users' replies, with their context in the prompt (`text`) and
without. Then a random Llama (width 768, 12 layers): NLL of random tokens. Both in float32 on one CPU device, with the
bytes of the layers' matrices; of the larger one also those of the projector's train step: its arguments, and its
temporary memory, which holds one layer's matrices in full at a time.
"""

import json
import os
from typing import Any

import tyro

KINDS = ("none", "int8", "int4", "nf4")


def nll(kind: Any, users: int) -> dict[str, float]:
    """Nats per target of the embedded backbone, by condition."""
    import jax

    from e2p_jax.config import BackboneConfig, Config, DataConfig
    from e2p_jax.datasets import synthetic
    from e2p_jax.train.partition import split
    from e2p_jax.train.score import pack_conditions, score
    from e2p_jax.train.setup import build_model, jit_eval_step, read_inputs
    from e2p_jax.vectors.population import Population

    config = Config(backbone=BackboneConfig(quantization=kind), data=DataConfig(seq_len=256))
    inputs = read_inputs(config)
    nobody = Population.standard(8)
    model = build_model(inputs, nobody)
    trainable, frozen = split(model.params, model.mask)
    packed, kept, _ = pack_conditions(
        synthetic.records("validation")[:users], ("none", "text"), inputs.encoder, None, nobody
    )
    step, figures = jit_eval_step(model), {"matrix_bytes": matrix_bytes(model.params["backbone"]["layers"])}
    with jax.set_mesh(model.mesh):
        for (name, _), dataset in packed.items():
            scores = score(dataset, kept, lambda batch: step(trainable, frozen, batch), model.mesh, 8)
            figures[f"nll_{name}"] = round(scores.per_target, 4)
    return figures


def matrix_bytes(layers: dict[str, Any]) -> int:
    return sum(value.nbytes for name, value in layers.items() if value.ndim == 3)


def random_llama(kind: Any) -> dict[str, float]:
    """A projector in front of a random Llama, and one row of 256 random tokens."""
    from made_up import Step, llama, random_model, random_rows

    config = llama(768, 2048, 12, 12, 8192)
    model = random_model(config, remat=True, quantization=kind)
    step = Step(model, random_rows(1, 256, 1, config.vocab_size))
    memory = step.compiled.memory_analysis()
    return {
        "matrix_bytes": matrix_bytes(model.params["backbone"]["layers"]),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "nll": round(step(), 4),
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
