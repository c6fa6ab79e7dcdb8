"""The training loop: read, resume or start, step, evaluate, keep."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import chex
import jax
import numpy as np
from etils import epath

from e2p_jax.config import Config, TrainConfig
from e2p_jax.data.conditions import FRONTS, vectors_of
from e2p_jax.data.pipeline import PackedDataset, batch_shapes, on_devices, pack, rows_at, train_iterator
from e2p_jax.data.training import read_training
from e2p_jax.datasets.records import Record
from e2p_jax.errors import Preempted, UserError
from e2p_jax.files import explain_full_disk, run_directory, write_text
from e2p_jax.parallel import distributed
from e2p_jax.parallel.mesh import bytes_per_device, describe_mesh
from e2p_jax.prefix.model import Batch
from e2p_jax.train.beyond import Beyond
from e2p_jax.train.checkpoint import Checkpoints, newest_step
from e2p_jax.train.metrics import Recorder
from e2p_jax.train.partition import describe, join, split
from e2p_jax.train.profile import Profile
from e2p_jax.train.run import Run, claim_run, lock_run, restore_parameters
from e2p_jax.train.score import Scores, pack_conditions, score, some
from e2p_jax.train.setup import (
    Inputs,
    Model,
    Shared,
    abstract_state,
    build_model,
    initial_state,
    jit_eval_step,
    jit_train_step,
    read_inputs,
)
from e2p_jax.train.start import begin
from e2p_jax.vectors.catalogue import Catalogue
from e2p_jax.vectors.index import distinct
from e2p_jax.vectors.population import Population, training_population
from e2p_jax.vectors.source import Vectors

Check = Callable[[Inputs, Mapping[str, Sequence[Record]]], None]


@dataclasses.dataclass(frozen=True)
class Data:
    """The data that a run trains and is evaluated on, packed."""

    train: PackedDataset
    held_out: dict[str, tuple[PackedDataset, list[Record]]]  # by split; `dev` picks the best checkpoint
    without: PackedDataset | None  # `dev` under `none`, where it has slots
    at_mean: PackedDataset | None  # `dev` with the mean of the training users' vectors in place of its own
    population: Population  # of the training users' vectors
    warnings: list[str]  # about these
    dropped_messages: int
    skipped: str | None  # what was skipped as bad, if anything was
    catalogue: Catalogue | None


def read_data(inputs: Inputs, check: Check = lambda *_: None) -> Data:
    """Reads, checks, tokenises and packs every split that the config names.

    Args:
      check: as `train_model` has it.

    Raises:
      UserError: naming the record, user or split at fault.
    """
    config, condition = inputs.config, inputs.config.data.condition
    read = read_training(config, inputs.encoder)
    check(inputs, read.reported)
    users, where = read.examples.users, read.examples.sources
    population, warnings = _population(inputs, users, where)
    vectors = vectors_of(users, where, condition, inputs.table, population)
    train = PackedDataset(read.examples, vectors, read.rows, read.budget, inputs.encoder.num_tokens)
    held_out = {}
    for name, others in ({"dev": read.dev} | read.reported if read.dev else read.reported).items():
        packed, kept, _ = pack_conditions(others, [condition], inputs.encoder, inputs.table, population)
        held_out[name] = (packed[condition, 0], kept)
    without = _without(inputs, *held_out["dev"]) if read.dev and FRONTS[condition].vector else None
    at_mean = None
    if without and FRONTS[condition].reads_table:
        mean = Vectors(population.mean[None], np.zeros(len(held_out["dev"][1]), np.int64))
        at_mean = dataclasses.replace(held_out["dev"][0], vectors=mean)
    if inputs.catalogue is not None:
        named = {"training": train, **{f"split {name}": dataset for name, (dataset, _) in held_out.items()}}
        if absent := [name for name, dataset in named.items() if not dataset.budget.items]:
            raise UserError(
                f"{inputs.catalogue.table.source}: no record of {absent[0]} names an item of it; give records `items`, "
                "or leave data.items out"
            )
        if unnamed := len(inputs.catalogue) - len(np.unique(read.examples.items)):
            warnings.append(
                f"data.items: {unnamed:,} of {len(inputs.catalogue):,} items are in no training record: they are "
                "learned as wrong answers and rank last; leave what is new out of the table, and give the whole one to "
                "`e2p evaluate --items`"
            )
    dropped, skipped = read.dropped_messages, read.skipped
    return Data(train, held_out, without, at_mean, population, warnings, dropped, skipped, inputs.catalogue)


def _without(inputs: Inputs, dataset: PackedDataset, records: Sequence[Record]) -> PackedDataset:
    """Nothing in front, in rows of the same shape."""
    examples = [inputs.encoder.encode(record, "none") for record in records]
    return pack(examples, dataset.vectors, inputs.encoder, dataset.budget)


def _population(inputs: Inputs, users: Sequence[str], where: Sequence[str]) -> tuple[Population, list[str]]:
    """The statistics of the training users' vectors, each user counted once, and what to warn of."""
    table, condition = inputs.table, inputs.config.data.condition
    if table is None:
        return Population.standard(1), []
    rows = distinct(table.rows(users, where))
    known = rows[rows >= 0]  # the null user has no part in the statistics
    if not len(known):
        raise UserError(f"{table.source}: holds none of the {len(set(users))} training users; give their table")
    return training_population(table, known, told_apart=FRONTS[condition].reads_table)


def train(config: Config, run: epath.PathLike) -> epath.Path:
    """Trains as `train_model` does; returns the run directory."""
    return train_model(config, run).directory


def train_model(
    config: Config,
    run: epath.PathLike,
    shared: Shared | None = None,
    profile: int = 0,
    check: Check = lambda *_: None,
) -> Run:
    """Trains until `train.steps`, resuming whatever `run` already holds. Every process of a run calls it.

    Args:
      shared: the backbone is taken from there, if it is the same one, or left there.
      profile: steps to trace (`Profile`).
      check: raises UserError where the records to report, by split, are no good for what comes after training.

    Returns:
      The run with the parameters of its best checkpoint, in front of the backbone that was trained in front of.

    Raises:
      UserError: before any compilation, whatever is wrong with the config, data, vectors or backbone; another command
        trains in `run`; or a loss, a gradient, a parameter or a split's NLL is not finite, and nothing of it was saved.
      Preempted: SIGTERM came; the run is saved.
    """
    run = run_directory(run)
    chex.clear_trace_counter()  # it counts by call site: a second run in this process traces its own steps
    inputs = read_inputs(config)
    _refuse_idle(config)
    data = read_data(inputs, check)
    distributed.check_same("training data", data.train.digest)
    model = build_model(inputs, data.population, shared)
    if FRONTS[config.data.condition].reads_table and newest_step(run) is None:
        model = begin(model, inputs, data.train.examples.users)
    with lock_run(run), explain_full_disk(run):
        claim_run(run, config, inputs, model)
        with contextlib.closing(Checkpoints(run, config.train)) as checkpoints:  # waits for what is being written
            model = _train(config, run, data, model, checkpoints, profile)
            step, model = restore_parameters(checkpoints, "best", model, config.train)
    return Run(run, step, inputs, model)


def _refuse_idle(config: Config) -> None:
    """Raises a UserError where nothing in front is the projector's, and it alone is to be trained."""
    named, condition = config.train.trainable, config.data.condition
    alone = all(pattern.startswith("projector/") for pattern in named) and not config.data.items
    if alone and FRONTS[condition].vector is None:
        raise UserError(
            f"data.condition={condition} puts no soft tokens in front, and the projector alone is to be trained: it "
            "would learn nothing; set data.condition=e2p, or name in train.trainable what else trains"
        )


def _train(config: Config, run: epath.Path, data: Data, model: Model, checkpoints: Checkpoints, profile: int) -> Model:
    """The model as it is after the last step."""
    settings, mesh = config.train, model.mesh
    held = {"data": data.train.digest().hex()}
    if data.catalogue is not None:
        held["items"] = data.catalogue.digest()
    if "dev" in data.held_out:
        held["dev"] = data.held_out["dev"][0].digest().hex()
    iterator = train_iterator(data.train, mesh, batch_rows=settings.rows, steps=settings.steps, seed=settings.seed)
    if checkpoints.latest_step is None:
        state, frozen = initial_state(model, settings)
    else:
        _, frozen = split(model.params, model.mask)
        state, statistics, position = checkpoints.restore(
            checkpoints.latest_step, abstract_state(model, settings), frozen["projector"]
        )
        frozen = {**frozen, "projector": statistics}
        for name, what in ("data", "training data"), ("dev", "dev data"), ("items", "items"):
            # An imported run has not met its data yet, and earlier versions did not write down what dev held.
            if position.pop(name, held.get(name)) != held.get(name):
                raise UserError(
                    f"{run}: its position is one in other {what}: records, vectors or plan have changed since step "
                    f"{int(state.step)}; restore them, or choose another --workdir"
                )
        planned = position.pop("steps", settings.steps)  # earlier versions did not write it
        if settings.steps != planned != int(state.step):
            raise UserError(
                f"{run}: checkpoint {int(state.step)} is on the way to train.steps={planned}, not {settings.steps}: "
                "set that in config.json again, finish, and let it grow then"
            )
        iterator.set_state(position)
    first = int(state.step)
    if distributed.is_first():
        write_text(run / "config.json", config.to_json())  # the settings in force

    of_items = "items" in model.params  # the items' loss picks the best checkpoint
    # Splits differ in their targets per row.
    eval_step = jit_eval_step(model, max_traces=len(data.held_out), items="item_nll" if of_items else "")
    recorder = Recorder(
        run,
        steps=settings.steps,
        first=first,
        log_every=settings.log_every,
        tokens_per_step=settings.rows * config.data.seq_len,
        users=functools.partial(_users_of_step, data.train, settings),
    )
    say = recorder.progress.say
    for damage in checkpoints.damaged:
        say(damage)
    for warning in data.warnings:
        say(f"warning: {warning}")
    say(describe(model.params, model.mask))
    say(
        f"{len(data.train.examples):,} conversations in {len(data.train.rows):,} rows, "
        f"{data.train.efficiency:.1%} full, {data.dropped_messages} old messages dropped; "
        f"a step has B={settings.rows} rows of T={config.data.seq_len} tokens, M={data.train.budget.targets} targets, "
        f"S={data.train.budget.segments} segments" + (f"; {data.skipped}" if data.skipped else "")
    )
    say(
        f"{distributed.hosts()}, {jax.device_count()} {jax.default_backend()} device(s), {describe_mesh(mesh)}, "
        f"{bytes_per_device((state, frozen)) / 2**20:,.1f} MiB per device"
        + (f"; resumed at step {first}" if first else "")
    )

    stop, numbers = False, range(first + 1, settings.steps + 1)
    # What stands in front is compared with nothing there, which stays what it is while the projector alone learns.
    watched = data.without is not None and not any(jax.tree.leaves({**model.mask, "projector": ()}))
    without: Scores | None = None
    with (
        contextlib.closing(recorder),
        contextlib.closing(Profile(run, first, profile)) as traced,
        jax.set_mesh(mesh),
        distributed.preemption(first) as stop_here,
    ):
        if numbers:
            shapes = batch_shapes(mesh, settings.rows, data.train.budget, data.train.vectors.width)
            train_step: jax.stages.Compiled = jit_train_step(model, settings).lower(state, frozen, shapes).compile()
        for number, (batch, position) in zip(numbers, on_devices(iterator, mesh, settings.rows), strict=False):
            with traced.step(number), jax.transfer_guard("disallow"):
                state, metrics = train_step(state, frozen, batch)
            traced.after(number, metrics)
            recorder.step(number, metrics)
            last, nll = number == settings.steps, None
            evaluated = number % settings.eval_every == 0 or last
            if evaluated:
                recorder.flush()
                evaluate = functools.partial(eval_step, state.trainable, frozen)
                scores = _evaluate(data, number, evaluate, mesh, settings.rows, of_items)
                by_split = {name: found.per_target for name, found in scores.items()}
                nll = by_split.get("dev")  # without one, the last checkpoint is the best
                beyond, mean = None, None
                if watched and data.without is not None:
                    records = data.held_out["dev"][1]
                    without = without or score(data.without, records, evaluate, mesh, settings.rows)
                    beyond = Beyond.of(scores["dev"], without, [record.user_id for record in records])
                    if last and data.at_mean is not None:
                        at_mean = score(data.at_mean, records, evaluate, mesh, settings.rows)
                        mean = at_mean.per_target - without.per_target
                recorder.evaluation(number, by_split, beyond, mean)
            stop = stop_here(number) and not last
            if evaluated or number % settings.checkpoint_every == 0 or stop:
                recorder.sync()
                position = {**position, **held, "steps": settings.steps}
                checkpoints.save(state, frozen["projector"], position, nll)
            if stop:
                break
        checkpoints.wait()  # while SIGTERM still asks, and does not end the process
    if stop:
        raise Preempted(f"told to stop; saved at step {number}, rerun the same command to resume")
    return dataclasses.replace(model, params=join(state.trainable, frozen, model.mask))


def _evaluate(
    data: Data,
    number: int,
    evaluate: Callable[[Batch], jax.Array],
    mesh: jax.sharding.Mesh,
    batch_rows: int,
    of_items: bool,
) -> dict[str, Scores]:
    """By split, after step `number`."""
    by_split = {}
    for name, (dataset, records) in data.held_out.items():
        try:
            by_split[name] = score(dataset, records, evaluate, mesh, batch_rows, of_items)
        except UserError as error:
            raise UserError(f"after step {number}, split {name}: {error}") from error
    return by_split


def _users_of_step(dataset: PackedDataset, settings: TrainConfig, number: int) -> str:
    """Some users of the batch of step `number`, those with the largest vectors first."""
    rows = rows_at(dataset, settings.seed, (number - 1) * settings.rows + np.arange(settings.rows))
    members = np.array([member for row in rows for member in dataset.rows[row]])
    sizes = np.abs(np.nan_to_num(dataset.vectors.gather(members))).max(axis=1)
    return some(dataset.examples.users[int(member)] for member in members[np.argsort(-sizes, kind="stable")])
