"""Begins a projector as `projector.start` says."""

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from e2p_jax import config as config_lib
from e2p_jax.errors import UserError
from e2p_jax.files import run_directory
from e2p_jax.train import identity
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.setup import Inputs, Model, place
from e2p_jax.train.words import begin_with_words

_OF_TRAINING = ("start", "noise", "dropout")  # and no say in what the parameters mean


def begin(model: Model, inputs: Inputs, users: Iterable[str]) -> Model:
    """The model with the first parameters of its projector. Every process calls it, and all get the same.

    Args:
      users: who are trained on.

    Raises:
      UserError: as `begin_with_words` and `begin_with_run` do.
    """
    start = inputs.config.projector.start
    if start == "words":
        return begin_with_words(model, inputs, users)
    return model if start == "random" else begin_with_run(model, inputs, start)


def begin_with_run(model: Model, inputs: Inputs, start: str) -> Model:
    """The model with the projector of another run's best checkpoint, its statistics of users and tokens among it.

    Raises:
      UserError: no such run, one in front of another backbone, or its projector is not of the same form.
    """
    directory = run_directory(start)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"projector.start is {start!r}; choose {', '.join(config_lib.STARTS)}, or a run directory (no config.json "
            "is there)"
        )
    then, now = config_lib.from_json(path.read_bytes(), Path(path)).projector, inputs.config.projector
    for field in dataclasses.fields(now):
        if field.name not in _OF_TRAINING and (value := getattr(then, field.name, None)) != getattr(now, field.name):
            raise UserError(
                f"projector.start={start}: that run has projector.{field.name}={value}, this one "
                f"{getattr(now, field.name)}; set it to the same"
            )
    identity.check_weights(directory, identity.read(directory), model)
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        step = checkpoints.step_of("best")
        checkpoints.check(step)
        begun = checkpoints.projector(step)
    own = model.params["projector"]
    if (shapes := {name: value.shape for name, value in begun.items()}) != {n: value.shape for n, value in own.items()}:
        name = next(name for name in sorted({*own, *begun}) if name not in own or shapes.get(name) != own[name].shape)
        raise UserError(
            f"projector.start={start}: {name} has shape {shapes.get(name)} there, "
            f"{own[name].shape if name in own else None} here; give vectors of the same width, and the same "
            "train.null_user_rate or none in both"
        )
    projector = {name: place(np.asarray(begun[name], value.dtype), value.sharding) for name, value in own.items()}
    return dataclasses.replace(model, params={**model.params, "projector": projector})
