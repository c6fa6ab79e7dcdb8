"""A run directory: claimed once, trained in by one command at a time, opened again to evaluate, generate or export.

`config.json` (resolved), `backbone.json` and `chat_template.jinja` (see `identity.py`), `metrics.jsonl`,
`tensorboard/`, `checkpoints/<step>/`, `report/`, and `items.txt` where there is a catalogue.
"""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from e2p_jax import config as config_lib
from e2p_jax.config import Condition, Config, MeshConfig, TrainConfig
from e2p_jax.config_versions import GONE
from e2p_jax.data.conditions import FRONTS, user_vectors
from e2p_jax.datasets.interactions.log import is_interactions, load_titles
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.files import in_bucket, run_directory, write_text
from e2p_jax.locks import locked
from e2p_jax.parallel import distributed
from e2p_jax.parallel.mesh import make_mesh
from e2p_jax.terminal import say
from e2p_jax.train import identity
from e2p_jax.train.checkpoint import Checkpoints, newest_step
from e2p_jax.train.partition import join, split
from e2p_jax.train.setup import (
    Inputs,
    Model,
    Parts,
    Shared,
    abstract_state,
    frozen_model,
    read_inputs,
    with_later_items,
)
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.source import Vectors

PyTree = Any

ITEMS = "items.txt"  # ids of the catalogue that was trained, a line each, in the order of its rows
_RULES = {("train", "steps"): " (it may grow, and only when all steps are done and the last checkpoint is whole)"}


@contextlib.contextmanager
def lock_run(run: epath.Path) -> Iterator[None]:
    """Keeps other commands from training in `run`.

    Raises:
      UserError: another command is training there, or the bucket cannot be written.
    """
    if not distributed.is_first():
        yield
        return
    me = f"process {os.getpid()} on host {socket.gethostname()}"
    with contextlib.ExitStack() as stack:
        try:
            if in_bucket(run):
                from e2p_jax.train.lease import lease

                stack.enter_context(lease(run, me))
            else:
                stack.enter_context(locked(Path(run / ".lock"), me))
        except BlockingIOError as error:
            holder = str(error) or "another command"
            raise UserError(f"{run}: {holder} is training there; stop it, or choose another --workdir") from error
        yield


def claim_run(run: epath.Path, config: Config, inputs: Inputs, model: Model) -> None:
    """Process 0 writes what names the run, unless a run is there; then all check that it is this one.

    Of the settings those are compared that change a run's result. What its data and vectors hold is compared with its
    checkpoint, when that is restored.

    Raises:
      UserError: the directory holds a run of another config or backbone, or is not seen by every host.
    """
    path = run / "config.json"
    if distributed.is_first():
        if path.exists():
            _check_claim(run, config, inputs, model)
        else:
            identity.write(run, config, inputs, model)
            if inputs.catalogue is not None:
                (run / ITEMS).write_bytes(inputs.catalogue.table.index.text.tobytes())
            write_text(path, config.to_json())  # last: it says that the rest is there
    distributed.wait_for_all("the run directory is claimed")
    if not path.exists():
        raise UserError(f"{run}: is not the directory that process 0 sees; --workdir must be on storage that all share")
    if not distributed.is_first():
        _check_claim(run, config, inputs, model)


def _check_claim(run: epath.Path, config: Config, inputs: Inputs, model: Model) -> None:
    stored = config_lib.from_json((run / "config.json").read_bytes(), run / "config.json")
    if differences := _differences(run, stored, config):
        raise UserError(
            f"{run}: holds a run with other settings ({'; '.join(differences)}); "
            "rerun with those, or choose another --workdir"
        )
    names = identity.read(run)
    for section, (gone, *_) in GONE.items():
        if names.get("settings", {}).get(section, {}).get(gone):
            raise UserError(
                f"{run}: was trained with {section}.{gone}, which this version does not have: it can be evaluated, "
                "asked and exported, not trained further; choose another --workdir"
            )
    identity.check_inputs(run, names, config, inputs)
    identity.check_weights(run, names, model)


def _differences(run: epath.Path, stored: Config, config: Config) -> list[str]:
    """Settings that make it another run, with what they were and are."""
    then, now = identity.settings(stored), identity.settings(config)
    if now["train"]["steps"] > then["train"]["steps"] == newest_step(run):
        del now["train"]["steps"]  # all of them are done: it may grow
    return [
        f"{section}.{name}: {then[section][name]!r} there, {value!r} here{_RULES.get((section, name), '')}"
        for section, fields in now.items()
        for name, value in fields.items()
        if name in then[section] and then[section][name] != value  # another kind has other fields
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready to use."""

    directory: epath.Path
    step: int
    inputs: Inputs
    model: Model  # with the checkpoint's parameters

    @property
    def population(self) -> Population:
        """Statistics of the vectors that the projector was trained on."""
        projector = self.model.params["projector"]
        return Population(*(np.asarray(projector[name]) for name in ("input_mean", "input_std")))

    def own_condition(self) -> Condition:
        """What it was trained under, with users' own vectors in front: e2p or e2p+text.

        Raises:
          UserError: it was not, and its projector knows nothing of a user.
        """
        condition = self.inputs.config.data.condition
        if FRONTS[condition].vector != "own":
            raise UserError(
                f"{self.directory}: was trained under data.condition={condition}, on no users' vectors, so that its "
                "soft tokens of users mean nothing; name a run that was trained under e2p"
            )
        return condition

    @property
    def opening(self) -> Callable[[str], list[int]] | None:
        """Where items stand in front of replies and a log has titles: an item's id -> the tokens that the reply behind
        it opens with, none for an item without a title.
        """
        path, encoder = self.inputs.config.data.path, self.inputs.encoder
        if self.inputs.catalogue is None or not encoder.item_token or not is_interactions(path):
            return None
        titles = load_titles(Path(path).expanduser())
        return lambda item: encoder.opening(titles[item], f"title of item {item!r}") if item in titles else []

    def vectors(self, records: Sequence[Record], condition: Condition) -> Vectors:
        """What a condition gives each record's user; raises `UserError` as `user_vectors` does."""
        return user_vectors(records, condition, self.inputs.table, self.population)


def _on_this_machine(config: Config) -> Config:
    """A run's config with what its training machine had and this one has not, a kernel or as many devices, replaced:
    neither changes what is computed.
    """
    if config.backbone.attention != "xla":
        config = config.change(backbone={"attention": "auto"})
    try:
        make_mesh(config.mesh)
    except UserError:
        config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1))
    return config


def open_run(
    directory: epath.PathLike,
    checkpoint: str = "best",
    embeddings: str | None = None,
    backbone: Parts = "all",
    shared: Shared | None = None,
    items: str | None = None,
) -> Run:
    """Loads the backbone that the run names and the parameters of a checkpoint, without the optimizer's moments.

    Args:
      checkpoint: `best`, `last`, or a step.
      embeddings: a table of user vectors to use in place of the run's own.
      backbone: what of it is loaded: all, or, where only projector and items are asked, the token embeddings or
        nothing. The model then has shapes in place of its other parameters. That it is the same backbone is checked
        all the same.
      shared: all of a backbone is taken from there, if it is the same one, or left there.
      items: a table of item vectors to use in place of the run's own; what it has beside the run's items are new ones.

    Raises:
      UserError: not a run, a damaged one, no checkpoint, another backbone, or vectors of another width.
    """
    directory = run_directory(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: not a run directory (no config.json)")
    config = begun = config_lib.from_json(path.read_bytes(), path)
    names = identity.read(directory)
    if embeddings is not None:
        config = config.change(data={"embeddings": embeddings})
    if items is not None:
        config = config.change(data={"items": items})
    inputs = _in_order(directory, read_inputs(_on_this_machine(config)))
    data, says_items = config.data.path, inputs.catalogue is not None and config.items.token
    if says_items and Path(data).is_absolute() and not os.access(data, os.R_OK):
        say(f"warning: {data}: not there; if it was a log, put it back: replies do not open with titles without it")
    identity.check_inputs(directory, names, begun, inputs)
    model = frozen_model(inputs, names["embedding_width"], backbone, shared)
    identity.check_weights(directory, names, model)
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        parts = ("",) if backbone == "all" else ("projector/", "items/")
        step, model = restore_parameters(checkpoints, checkpoint, model, config.train, parts)
    return Run(directory, step, inputs, with_later_items(model, inputs.catalogue))


def _in_order(directory: epath.Path, inputs: Inputs) -> Inputs:
    """With the items in the order that the run's checkpoints have them in."""
    if inputs.catalogue is None:
        return inputs
    path = directory / ITEMS
    if not path.exists():
        raise UserError(
            f"{directory}: was trained without items, or {ITEMS} was lost; leave --items out, or restore it"
        )
    catalogue = inputs.catalogue.behind(path.read_bytes().decode().removesuffix("\n").split("\n"), str(directory))
    encoder = dataclasses.replace(inputs.encoder, catalogue=catalogue)
    return dataclasses.replace(inputs, catalogue=catalogue, encoder=encoder)


def restore_parameters(
    checkpoints: Checkpoints, checkpoint: str, model: Model, settings: TrainConfig, parts: tuple[str, ...] = ("",)
) -> tuple[int, Model]:
    """A checkpoint's step, and the model with its parameters: those whose path begins with one of `parts`, and the
    projector's statistics.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it does not fit.
    """
    step = checkpoints.step_of(checkpoint)
    checkpoints.check(step)
    _, frozen = split(model.params, model.mask)
    state = abstract_state(model, settings)
    state, statistics, _ = checkpoints.restore(
        step, state, frozen["projector"], lambda path: path.startswith(tuple(f"trainable/{part}" for part in parts))
    )
    params = join(state.trainable, {**frozen, "projector": statistics}, model.mask)
    return step, dataclasses.replace(model, params=params)
