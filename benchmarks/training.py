"""Training speed beside other ways to train the same thing: a table of ratios, measured side by side in one process.

    python benchmarks/training.py                                   # 41M parameters, generated personas, CPU
    python benchmarks/training.py --data data/persona_chat/self_original/1.0.0
    python benchmarks/training.py --shape llama-3.2-1b --seq-len 2048 --rows 8      # on a GPU

Contenders, on the same weights and conversations: ours; naive torch (transformers with `inputs_embeds`, an example a
turn, padded, logits everywhere: what public E2P code does); smart torch (our packed rows, block-diagonal SDPA mask,
logits at targets, `torch.compile`); PEFT's prompt tuning (a static prompt; one example a turn). All must give the same
loss on the same conversations before anything is timed. A round runs a step of each; the table has medians.
"""

import dataclasses
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the card

import jax
import jax.numpy as jnp
import measure
import models
import numpy as np
import torch
import torch_peers
import tyro

from e2p_jax.config import BackboneConfig, Config, DataConfig, ProjectorConfig, TrainConfig
from e2p_jax.data.encode import Example
from e2p_jax.data.pipeline import PackedDataset, pack, to_devices
from e2p_jax.data.prepared import load_records
from e2p_jax.train import setup
from e2p_jax.train.step import make_eval_step

WIDTH = 384  # of the user vectors


def needed_flops(config: Any, batch: dict[str, np.ndarray]) -> float:
    """What one step's mathematics needs: no padding, no recomputation, no weight gradients.

    4 for each weight of the layers and token (forward, and back to the input); attention's two products, forward once
    and backward twice, over the visible pairs; 4 for each weight of the head and target.
    """
    c, segments = config, batch["segment_ids"]
    heads, groups = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.hidden_size * (2 * heads + 2 * groups) + 3 * c.hidden_size * c.intermediate_size
    tokens = int((segments > 0).sum())
    pairs = int(sum(batch["positions"][segments > 0].astype(np.int64) + 1))
    targets = float(batch["target_weights"].sum())
    attention = 3 * 2 * 2 * pairs * heads
    return c.num_layers * (4 * layer * tokens + attention) + 4 * c.vocab_size * c.hidden_size * targets


def matmul_rate(dtype: Any, size: int, clock: measure.Clock) -> float:
    """FLOPs a second of one large product on this device, measured: what utilisation is a share of."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    contender = measure.Contender("matmul", lambda: product(a).block_until_ready(), 2.0 * size**3)
    measure.take_turns([contender], 5, clock)
    return contender.amount / min(contender.seconds)


@dataclasses.dataclass(frozen=True)
class Work:
    """Conversations, encoded and packed."""

    dataset: PackedDataset
    rows: list[int]  # of the batch that is timed

    @property
    def batch(self) -> dict[str, np.ndarray]:
        return self.dataset.batch(self.rows)

    def members(self, rows: list[int]) -> tuple[list[Example], list[np.ndarray]]:
        """The conversations in some rows, and their vectors."""
        numbers = [number for row in rows for number in self.dataset.rows[row]]
        return [self.dataset.examples[n] for n in numbers], [self.dataset.vectors[n] for n in numbers]


def read_work(inputs: setup.Inputs, path: str, rows: int) -> Work:
    """The first conversations, enough for several batches."""
    records = load_records(path, "train")
    examples = [inputs.encoder.fit(record, ["e2p"]).examples["e2p"] for record in records[: 60 * rows]]
    vectors = np.random.default_rng(0).normal(size=(len(examples), WIDTH)).astype(np.float32)
    dataset = pack(examples, vectors, inputs.encoder)
    return Work(dataset, list(range(min(rows, len(dataset.rows)))))


def ours(model: setup.Model, config: Config, work: Work) -> tuple[Callable[[], float], Any]:
    """(a step that waits for its end, the compiled step)."""
    state, frozen = setup.initial_state(model, config.train)
    with jax.set_mesh(model.mesh):
        batch = to_devices(work.batch, model.mesh, config.train.rows)
        compiled = setup.jit_train_step(model, config.train).lower(state, frozen, batch).compile()
        holder = [state]

        def run() -> float:
            with jax.set_mesh(model.mesh):
                holder[0], metrics = compiled(holder[0], frozen, batch)
            return float(metrics.loss)

    return run, compiled


def check_losses(
    model: setup.Model, work: Work, torch_model: torch.nn.Module, projector: torch_peers.Projector, device: str
) -> None:
    """Summed nats over the conversations of one row, by each contender's forward pass, against ours.

    Raises:
      SystemExit: a peer computes something else.
    """
    row = work.rows[:1]
    examples, vectors = work.members(row)
    batch = work.dataset.batch(row)
    params = model.params
    evaluate = jax.jit(make_eval_step(model.graph, model.mask))
    trainable, frozen = setup.split(params, model.mask)
    reference = float(np.asarray(evaluate(trainable, frozen, {k: jnp.asarray(v) for k, v in batch.items()})).sum())
    targets = batch["target_weights"].sum()
    turns = [torch_peers.one_per_turn([example]) for example in examples]
    with torch.no_grad():
        naive = sum(
            float(torch_peers.naive_loss(torch_model, projector)(torch_peers.padded(t, [v] * len(t), device)))
            * sum(int(e.is_target.sum()) for e in t)
            for t, v in zip(turns, vectors, strict=True)
        )
        dtype = next(torch_model.parameters()).dtype
        packed = torch_peers.packed(batch, dtype, device)
        smart = float(torch_peers.smart_loss(torch_model, projector, compiled=False)(packed)) * targets
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    print(f"nats a target on {len(examples)} conversations: ours {reference / targets:.6f}, ", end="")
    print(f"naive torch {naive / targets:.6f}, smart torch {smart / targets:.6f}")
    if max(abs(naive - reference), abs(smart - reference)) > tolerance * reference:
        raise SystemExit("the contenders disagree about the loss")


def main(
    shape: models.Shape = "41m",
    data: str = "synthetic",
    seq_len: int = 512,
    rows: int = 8,
    turns: int = 16,
    repeats: int = 5,
    remat: bool = False,
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto",
    peers: tuple[Literal["naive", "smart", "peft"], ...] = ("naive", "smart", "peft"),
    clock: measure.Clock = "wall",
    json_out: Path | None = None,
) -> None:
    """Measures.

    Args:
      shape: Of the random Llama.
      data: A prepared dataset's directory, a JSON Lines file, or synthetic: generated personas.
      seq_len: T.
      rows: B, of ours and of smart torch.
      turns: Examples a batch of naive torch and PEFT.
      repeats: Rounds.
      remat: Recompute our layers in the backward pass.
      attention: Ours: `backbone.attention`.
      peers: Which run beside ours.
      clock: wall, or cpu: this process's processor time, for a busy machine (run it under `taskset -c 0`).
      json_out: File for the figures.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch_model: Any = models.write_model(shape, directory, dtype, device)
        config = Config(
            backbone=BackboneConfig(path=name, remat=remat, attention=attention),
            data=DataConfig(seq_len=seq_len),
            projector=ProjectorConfig(dropout=0.0),
            train=TrainConfig(rows=rows),
        )
        inputs = setup.read_inputs(config)
        work = read_work(inputs, data, rows)
        model = setup.build_model(inputs, work.dataset.vectors)
    values = {name: np.asarray(value) for name, value in model.params["projector"].items()}
    projector = torch_peers.Projector(values).to(device)
    check_losses(model, work, torch_model, projector, device)

    run, compiled = ours(model, config, work)
    batch = work.batch
    targets = float(batch["target_weights"].sum())
    contenders = [measure.Contender("e2p_jax", run, targets)]
    memory = compiled.memory_analysis()
    flops = needed_flops(inputs.decoder, batch)
    peak = matmul_rate(jnp.bfloat16, 8192, clock) if on_gpu else matmul_rate(jnp.float32, 2048, clock)

    examples, vectors = work.members(work.rows)
    pairs = [(turn, v) for e, v in zip(examples, vectors, strict=True) for turn in torch_peers.one_per_turn([e])]
    chosen = [pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))[:turns]]
    padded = torch_peers.padded([e for e, _ in chosen], [v for _, v in chosen], device)
    padded_targets = float((padded["labels"] >= 0).sum())
    if "naive" in peers:
        step = torch_peers.adam_step(list(projector.parameters()), torch_peers.naive_loss(torch_model, projector))
        contenders.append(measure.Contender("naive torch", lambda: step(padded), padded_targets))
    if "smart" in peers:
        packed = torch_peers.packed(batch, dtype, device)
        smart = torch_peers.adam_step(
            list(projector.parameters()), torch_peers.smart_loss(torch_model, projector, compiled=True)
        )
        contenders.append(measure.Contender("smart torch", lambda: smart(packed), targets))
    if "peft" in peers:
        start = torch_model.get_input_embeddings().weight[5].detach()
        tuned, loss = torch_peers.prompt_tuning(torch_model, start)
        tune = torch_peers.adam_step([p for p in tuned.parameters() if p.requires_grad], loss)
        contenders.append(measure.Contender("PEFT prompt tuning", lambda: tune(padded), padded_targets))
    gc.collect()
    measure.take_turns(contenders, repeats, clock)
    title = f"{shape}, T={seq_len}, {rows} rows, {device}: training"
    figures = measure.report(title, "targets", contenders[0], contenders)
    figures |= {
        "model_flops_a_step": flops,
        "matmul_flops_per_second": peak,
        "utilisation": flops / peak / float(np.median(contenders[0].seconds)),
        "temporary_bytes": memory.temp_size_in_bytes,
        "row_efficiency": work.dataset.efficiency,
        "targets_a_batch": targets,
        "target_budget": work.dataset.budget.targets * rows,
    }
    print(f"utilisation {figures['utilisation']:.1%} of {peak / 1e12:.2f} TFLOP/s, the device's own matmul rate")
    print(f"temporary memory of our step {memory.temp_size_in_bytes / 2**20:,.0f} MiB, ", end="")
    print(f"rows {work.dataset.efficiency:.1%} full")
    measure.write_json(json_out, figures)


if __name__ == "__main__":
    tyro.cli(main)
