"""What `backbone.quantization` costs and saves: prints one line of JSON a backbone.

    python benchmarks/quantization.py --users 200
    python benchmarks/quantization.py --topology h100:1     # or v5e:2x2; jax[cuda13] or jax[tpu], none of the devices

First the embedded backbone: NLL of held-out generated users' replies, with their context in the prompt (`text`) and
without. Then a random Llama (width 768, 12 layers): NLL of random tokens. Both in float32 on one CPU device, with the
bytes of the layers' matrices; of the larger one also those of the projector's train step: its arguments, and its
temporary memory, which holds one layer's matrices in full at a time.

With a topology, what a step of decoding reads and writes there, by the compiled program (its MiB, and those set aside):
one token of each row through a stack of layers that are two matrices each.
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


def decoding(kind: Any, topology: str, rows: int) -> dict[str, int]:
    """Four layers of the MLP's width of Llama-3.1-8B."""
    import jax
    import jax.numpy as jnp

    from e2p_jax.backbone.quantize import multiply, quantize
    from e2p_jax.plan.hlo import Program
    from e2p_jax.plan.topology import find_topology

    here = jax.sharding.SingleDeviceSharding(find_topology(topology).devices[0])

    def stored(name: str, *shape: int) -> dict[str, Any]:
        whole = jax.ShapeDtypeStruct((4, *shape), jnp.bfloat16)
        parts = {"": whole} if kind == "none" else jax.eval_shape(lambda w: quantize(w, kind), whole)
        return {name + form: part.update(sharding=here) for form, part in parts.items()}

    def step(x: Any, params: Any) -> Any:
        def layer(x: Any, p: Any) -> Any:
            return x + multiply(jax.nn.silu(multiply(x, p, "up")), p, "down"), None

        return jax.lax.scan(layer, x, params)[0]

    params = stored("up", 14336, 4096) | stored("down", 4096, 14336)
    x = jax.ShapeDtypeStruct((rows, 1, 4096), jnp.bfloat16, sharding=here)
    compiled = jax.jit(step).lower(x, params).compile()
    nbytes = {
        "stored": sum(part.size * part.dtype.itemsize for part in params.values()),
        "traffic": Program(compiled.as_text()).hbm_bytes,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    return {name: round(count / 2**20) for name, count in nbytes.items()}


def main(users: int = 200, topology: str = "", rows: int = 16) -> None:
    """Measures all kinds.

    Args:
      users: Generated users whose replies the embedded backbone is scored on, 200 at most.
      topology: Devices that a step of decoding is compiled for instead, as `e2p plan` takes them.
      rows: Rows of that step.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology:
        print(json.dumps({"topology": topology, **{kind: decoding(kind, topology, rows) for kind in KINDS}}))
        return
    for name, measure in [("embedded", lambda kind: nll(kind, users)), ("random", random_llama)]:
        print(json.dumps({"backbone": name, **{kind: measure(kind) for kind in KINDS}}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
