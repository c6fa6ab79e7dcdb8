"""Training speed beside other ways to train the same thing: a table of ratios, measured side by side in one process.

    python benchmarks/training.py                                   # 41M parameters, generated personas, CPU
    python benchmarks/training.py --data data/persona_chat/self_original/1.0.0
    python benchmarks/training.py --shape llama-3.2-1b --seq-len 2048 --rows 8      # on a GPU

Contenders, on the same weights and conversations: ours; naive torch (transformers with `inputs_embeds`, an example a
turn, padded, logits everywhere: what public E2P code does); smart torch (our packed rows, block-diagonal SDPA mask,
logits at targets, `torch.compile`), on a GPU with FlexAttention too; PEFT's prompt tuning (a static prompt; one example
a turn); Tunix's PEFT trainer (a conversation a row, padded, logits everywhere). All must give our loss on the same
conversations before anything is timed. A round runs some steps of each and waits for the last, as training does, which
looks at a loss when the next step is on its way; the table has medians.
"""

import functools
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the card

import arithmetic
import jax
import jax.numpy as jnp
import measure
import models
import numpy as np
import torch
import torch_peers
import tunix_peer
import tyro
import work
from peers import LeftOut, Peer, Stage

from e2p_jax.config import BackboneConfig, Config, DataConfig, PrefixConfig, TrainConfig
from e2p_jax.data.pipeline import to_devices
from e2p_jax.prefix import mlp
from e2p_jax.train import setup
from e2p_jax.train.partition import split
from e2p_jax.train.step import make_eval_step
from e2p_jax.vectors.population import Population

PEERS: dict[str, Callable[[Stage], Peer]] = {
    "naive": torch_peers.naive,
    "smart": torch_peers.smart,
    "flex": torch_peers.flex,
    "peft": torch_peers.prompt_tuning,
    "tunix": tunix_peer.tunix,
}
PeerName = Literal["naive", "smart", "flex", "peft", "tunix"]


def ours(model: setup.Model, config: Config, batch: dict[str, np.ndarray]) -> tuple[Callable[[], Any], Any]:
    """(a step, whose loss may be waited for, and the compiled step)."""
    state, frozen = setup.initial_state(model, config.train)
    with jax.set_mesh(model.mesh):
        placed = to_devices(batch, model.mesh, config.train.rows)
        compiled = setup.jit_train_step(model, config.train).lower(state, frozen, placed).compile()
        holder = [state]

        def run() -> jax.Array:
            with jax.set_mesh(model.mesh):
                holder[0], metrics = compiled(holder[0], frozen, placed)
            return metrics.loss

    return run, compiled


def several(step: Callable[[], Any], steps: int) -> float:
    """So many steps one after the other, and the loss of the last."""
    return float([step() for _ in range(steps)][-1])


def our_nats(model: setup.Model, row: dict[str, np.ndarray], prompt: torch.Tensor | None) -> float:
    """Mean nats per target of one row, with `prompt` [D] as every user's soft token where it is given."""
    params = model.params
    if prompt is not None:
        still = jax.tree.map(jnp.zeros_like, params["projector"])
        still["input_std"] = jnp.ones_like(still["input_std"])
        params = {**params, "projector": still | {"token_mean": jnp.asarray(prompt.float().cpu().numpy())}}
    evaluate = jax.jit(make_eval_step(model.graph, model.mask))
    nll = evaluate(*split(params, model.mask), {name: jnp.asarray(array) for name, array in row.items()})
    return float(nll.sum()) / float(row["target_weights"].sum())


def compare(peer: Peer, model: setup.Model, stage: Stage) -> tuple[float, float]:
    """(our mean nats per target, the peer's) on the conversations of one row.

    Raises:
      SystemExit: they differ.
    """
    reference, theirs = our_nats(model, stage.work.first_row, peer.prompt), peer.nats()
    print(f"{peer.name}: {theirs:.6f} nats per target where ours is {reference:.6f}")
    if abs(theirs - reference) > (1e-4 if stage.dtype == torch.float32 else 2e-2) * reference:
        raise SystemExit(f"{peer.name} computes something else")
    return reference, theirs


def main(
    shape: models.Shape = "41m",
    data: str = "synthetic",
    seq_len: int = 512,
    rows: int = 8,
    turns: int = 16,
    steps: int = 4,
    repeats: int = 5,
    remat: bool = False,
    attention: Literal["auto", "xla", "splash", "cudnn", "mosaic"] = "auto",
    peers: tuple[PeerName, ...] = ("naive", "smart", "flex", "peft", "tunix"),
    clock: measure.Clock = "wall",
    json_out: Path | None = None,
) -> None:
    """Measures.

    Args:
      shape: Of the random Llama.
      data: A prepared dataset's directory, a JSON Lines file, or synthetic: generated personas.
      seq_len: T.
      rows: B, of ours and of smart torch; of Tunix, conversations.
      turns: Examples a batch of naive torch and PEFT.
      steps: A turn, of each.
      repeats: Rounds.
      remat: Recompute our layers in the backward pass.
      attention: Ours: `backbone.attention`.
      peers: Which run beside ours; one that cannot run here is left out, and said so.
      clock: wall, or cpu: this process's processor time, for a busy machine (run it under `taskset -c 0`).
      json_out: File for the figures.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    contenders, losses, left_out = [], {}, {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch_model: Any = models.write_model(shape, directory, dtype, device)
        config = Config(
            backbone=BackboneConfig(path=name, remat=remat, attention=attention),
            data=DataConfig(seq_len=seq_len),
            prefix=PrefixConfig(placement="before_bos"),  # as all others have it
            projector=mlp.Settings(dropout=0.0),
            train=TrainConfig(rows=rows),
        )
        inputs = setup.read_inputs(config)
        packed = work.read_work(inputs, data, rows)
        model = setup.build_model(inputs, Population.of(packed.dataset.vectors.gather()))
        projector = {name: np.asarray(value) for name, value in model.params["projector"].items()}
        stage = Stage(packed, directory, torch_model, projector, turns, device, dtype)
        for key in peers:
            try:
                peer = PEERS[key](stage)
                losses[peer.name] = compare(peer, model, stage)
                peer.step()
            except (LeftOut, RuntimeError, NotImplementedError) as reason:  # torch's compiler, on this very device
                left_out[key] = f"{type(reason).__name__}: {reason}"[:500]
                print(f"{key} is left out: {left_out[key]}")
                continue
            turn = functools.partial(several, peer.step, steps)
            contenders.append(measure.Contender(peer.name, turn, steps * peer.targets))

    batch = packed.batch
    run, compiled = ours(model, config, batch)
    targets = float(batch["target_weights"].sum())
    contenders.insert(0, measure.Contender("e2p_jax", functools.partial(several, run, steps), steps * targets))
    peak = arithmetic.matmul_rate(jnp.bfloat16 if on_gpu else jnp.float32, 8192 if on_gpu else 2048, clock)
    gc.collect()
    measure.take_turns(contenders, repeats, clock)
    title = f"{shape}, T={seq_len}, {rows} rows, {device}: training"
    figures = measure.report(title, "targets", contenders[0], contenders)
    flops = arithmetic.needed_flops(inputs.decoder, batch)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    figures |= {
        "nats_a_target": {name: {"ours": mine, "theirs": theirs} for name, (mine, theirs) in losses.items()},
        "left_out": left_out,
        "model_flops_a_step": flops,
        "matmul_flops_per_second": peak,
        "utilisation": steps * flops / peak / float(np.median(contenders[0].seconds)),
        "temporary_bytes": temporary,
        "row_efficiency": packed.dataset.efficiency,
        "targets_a_batch": targets,
        "target_budget": packed.dataset.budget.targets * rows,
    }
    print(f"utilisation {figures['utilisation']:.1%} of {peak / 1e12:.2f} TFLOP/s, the device's own matmul rate")
    print(f"temporary memory of our step {temporary / 2**20:,.0f} MiB, rows {packed.dataset.efficiency:.1%} full")
    measure.write_json(json_out, figures)


if __name__ == "__main__":
    tyro.cli(main)
