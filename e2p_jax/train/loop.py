"""The training loop: resume or start, step, evaluate, keep."""

import functools
import time
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np

from e2p_jax.config import Config
from e2p_jax.data.pipeline import pack, to_devices, train_iterator, user_vectors
from e2p_jax.data.prepared import load_records
from e2p_jax.data.records import Record
from e2p_jax.evaluate.score import Scores, pack_conditions, score
from e2p_jax.parallel.mesh import replicated
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.metrics import MetricsLog, Progress
from e2p_jax.train.optimizer import make_optimizer, schedule
from e2p_jax.train.partition import describe
from e2p_jax.train.run import claim_run
from e2p_jax.train.setup import Inputs, build_model, initial_state, read_inputs
from e2p_jax.train.step import TrainState, make_eval_step, make_train_step

def training_vectors(inputs: Inputs, records: list[Record]) -> np.ndarray:
    """[U, E] float32, one per training user; a single zero where the config uses no table."""
    if inputs.table is None:
        return np.zeros((1, 1), np.float32)
    first = {record.user_id: record.source for record in records}
    return inputs.table.lookup(list(first), list(first.values()))


def train(config: Config, run: Path) -> Path:
    """Trains until `train.steps`, resuming whatever `run` already holds.

    Raises:
      UserError: before any compilation, whatever is wrong with the config, data, vectors or backbone.
    """
    inputs = read_inputs(config)
    condition = config.data.condition
    records = load_records(config.data.path, config.data.train_split)
    fitted = [inputs.encoder.fit(record, [condition]) for record in records]
    records, dropped = [record for record, _ in fitted], sum(count for _, count in fitted)
    examples = [inputs.encoder.encode(record, condition) for record in records]
    data = pack(examples, user_vectors(records, condition, inputs.table), inputs.encoder)
    held_out = {}
    for name in config.data.eval_splits:
        packed, kept, _ = pack_conditions(load_records(config.data.path, name), [condition], inputs.encoder, inputs.table)
        held_out[name] = (packed[condition], kept)

    model = build_model(inputs, training_vectors(inputs, records))
    claim_run(run, config, inputs, model)
    state, frozen = initial_state(model, config.train)
    checkpoints = Checkpoints(run)
    iterator = train_iterator(
        data, model.mesh, batch_rows=config.train.rows, steps=config.train.steps, seed=config.train.seed
    )
    # Resume from the last checkpoint, or start at step 0.
    if checkpoints.latest_step is not None:
        state, statistics, position = checkpoints.restore(checkpoints.latest_step, state, frozen["projector"])
        frozen = {**frozen, "projector": statistics}
        iterator.set_state(position)
    first = int(state.step)

    optimizer, rate = make_optimizer(config.train, model.mask), schedule(config.train)
    step_function = make_train_step(model.graph, model.mask, optimizer, rate, config.train.accumulation)
    train_step = jax.jit(chex.assert_max_traces(step_function, n=1), donate_argnums=0)
    eval_steps = {
        name: jax.jit(chex.assert_max_traces(make_eval_step(model.graph, model.mask), n=1), out_shardings=replicated(model.mesh))
        for name in held_out
    }

    log = MetricsLog(run, first)
    progress = Progress(config.train.steps, first, "train")
    progress.say(describe(model.params, model.mask))
    progress.say(
        f"{len(records):,} conversations in {len(data.rows):,} rows of {data.budget.tokens} tokens "
        f"({data.efficiency:.1%} full, {dropped} old messages dropped); {jax.device_count()} {jax.default_backend()} devices"
    )
    if first:
        progress.say(f"resumed at step {first}")

    def evaluate(state: TrainState) -> dict[str, Scores]:
        results = {}
        for name, (dataset, kept) in held_out.items():
            run_eval = functools.partial(eval_steps[name], state.trainable, frozen)
            results[name] = score(dataset, kept, run_eval, model.mesh, config.train.rows)
        return results

    pending: tuple[int, Any] | None = None

    def flush(show: bool) -> None:
        """Writes the metrics of an earlier step: by now they are there, and nothing waits for them."""
        nonlocal pending, clock
        if pending is None:
            return
        number, metrics = pending
        pending = None
        values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        now, speed = time.monotonic(), 0.0
        if number > clock[1]:
            speed = (number - clock[1]) * config.train.rows * config.data.seq_len / (now - clock[0])
        clock = (now, number)
        log.write(number, {**values, "train/tokens_per_second": speed})
        progress.update(number, f"loss {values['train/loss']:.4f}  {speed:,.0f} tok/s", show)

    clock = (time.monotonic(), first)
    with jax.set_mesh(model.mesh), jax.transfer_guard("disallow"):
        for number in range(first + 1, config.train.steps + 1):
            with jax.transfer_guard("allow"):
                batch = to_devices(next(iterator), model.mesh, config.train.rows)
            state, metrics = train_step(state, frozen, batch)
            last = number == config.train.steps
            with jax.transfer_guard("allow"):
                flush(show=True)
                if number % config.train.log_every == 0 or number == first + 1 or last:
                    pending = (number, metrics)
                nll = None
                if number % config.train.eval_every == 0 or last:
                    flush(show=True)
                    results = evaluate(state)
                    nll = results[config.data.eval_splits[0]].per_target
                    log.write(number, {f"eval/{name}/nll": s.per_target for name, s in results.items()})
                    progress.say(f"step {number}: " + ", ".join(f"{n} NLL {s.per_target:.4f}" for n, s in results.items()))
                    clock = (time.monotonic(), number)
                if nll is not None or number % config.train.checkpoint_every == 0:
                    flush(show=True)
                    log.sync()
                    checkpoints.save(state, frozen["projector"], iterator.get_state(), nll)
    checkpoints.close()
    log.close()
    progress.close()
    return run
