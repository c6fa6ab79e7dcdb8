"""An exported transformers directory as a run again, so that training can go on."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.backbone.weights import copy_companions
from e2p_jax.config import Config, MeshConfig, from_json
from e2p_jax.data.columns import Ragged
from e2p_jax.data.examples import Examples
from e2p_jax.data.packing import Budget
from e2p_jax.data.pipeline import PackedDataset, train_iterator
from e2p_jax.errors import UserError
from e2p_jax.files import explain_refusal, replace_directory
from e2p_jax.json_files import is_digest, read_object
from e2p_jax.prefix.projector import kind_of
from e2p_jax.tensors import write_tensors
from e2p_jax.terminal import say
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.run import claim_run
from e2p_jax.train.setup import Model, build_model, initial_state, read_inputs
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.source import Vectors


def import_transformers(directory: Path, out: Path, data: str | None = None, embeddings: str | None = None) -> Config:
    """Writes a run at step 0 whose projector is the exported one: its optimizer and data begin afresh.

    The config is the exported run's, less the mesh, which is the machine's matter. A backbone that is in the directory
    goes into the run; one that is named there is named here.

    Args:
      data: what to train on, where it is not found by the name that the export has for it.
      embeddings: the table of user vectors, likewise; a run without one takes vectors from files.

    Returns:
      The run's config.

    Raises:
      UserError: not such a directory, weights that do not fit its config, or another backbone than was exported.
    """
    with explain_refusal(out):
        taken = out.exists()
    if taken:
        raise UserError(f"--out {out}: exists; choose a new directory")
    settings = _read_settings(directory)
    if settings.get("num_items"):
        say(f"warning: the head over items is not imported, and replies follow no item: it stays in {directory}")
    exported = from_json(json.dumps(settings["run"]["config"]), directory / "config.json")
    checkpoint = Checkpoint(directory)
    vectors, width = checkpoint.tensors.get("projector.input_mean"), settings["embedding_size"]
    if vectors is None or vectors.shape != (width,):
        raise UserError(f"{directory}: no tensor projector.input_mean of shape ({width},); export it again")
    with replace_directory(out) as temporary:
        template = _chat_template(directory)
        (temporary / "chat_template.jinja").write_text(template, encoding="utf-8")
        if settings["backbone"] is None:
            _write_backbone(checkpoint, settings, temporary / "backbone")
        exported = _with_data(exported, data, embeddings)
        here, there = (_with_paths(exported, settings, place) for place in (temporary, out.resolve()))
        inputs = read_inputs(here)
        model = build_model(inputs, Population.standard(settings["embedding_size"]))
        if model.fingerprint != settings["run"]["fingerprint"]:
            wanted = settings["run"]["fingerprint"]
            raise UserError(
                f"{directory}: its projector was trained in front of weights with fingerprint {wanted[:12]}, the "
                f"backbone's is {model.fingerprint[:12]}; restore that backbone"
            )
        model = _with_projector(model, checkpoint, kind_of(there.projector.kind).TORCH_NAMES)
        claim_run(temporary, there, inputs, model)
        state, frozen = initial_state(model, there.train)
        checkpoints = Checkpoints(temporary, there.train)
        checkpoints.save(state, frozen["projector"], _first_position(model, there), None)
        checkpoints.close()
    return there


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    settings = read_object(path, "export the run again") if path.is_file() else {}
    run, named, size = settings.get("run"), settings.get("backbone"), settings.get("embedding_size")
    if settings.get("model_type") != "e2p" or not isinstance(run, dict):
        raise UserError(f"{directory}: not a directory that `e2p export --format transformers` wrote; give one")
    revision = named.get("revision") if isinstance(named, dict) else None
    named_well = isinstance(named, dict) and isinstance(named.get("path"), str) and isinstance(revision, str | None)
    prefix = run.get("backbone_prefix")
    right = {
        "embedding_size": type(size) is int and size > 0,
        "backbone": named is None or named_well,
        "backbone_config": isinstance(settings.get("backbone_config"), dict),
        "run.config": isinstance(run.get("config"), dict),
        "run.fingerprint": is_digest(run.get("fingerprint")),
        "run.backbone_prefix": isinstance(prefix, str) and prefix.startswith("backbone."),
    }
    for name, is_right in right.items():
        if not is_right:
            raise UserError(f"{path}: {name} is missing or of the wrong kind; export the run again")
    return settings


def _chat_template(directory: Path) -> str:
    path = directory / "chat_template.jinja"
    if not path.is_file():
        raise UserError(f"{path}: does not exist; copy it from the exported directory")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it from the exported directory") from error


def _with_data(config: Config, data: str | None, embeddings: str | None) -> Config:
    """The config with the given data; a table that is named only, and not found from here, is none."""
    named = config.data.embeddings
    found = named is not None and (named == "synthetic" or Path(named).exists())
    embeddings = embeddings or (named if found else None)
    given = {"path": data or config.data.path, "embeddings": embeddings, "items": None}  # the head stayed in the run
    return config.change(data=given).resolved()


def _with_paths(config: Config, settings: dict[str, Any], run: Path) -> Config:
    """The exported run's config for a run directory at `run`."""
    named = settings["backbone"]
    path, revision = (named["path"], named["revision"]) if named else (str(run / "backbone"), None)
    template = str(run / "chat_template.jinja")
    changed = config.change(backbone={"path": path, "revision": revision}, data={"chat_template": template})
    return dataclasses.replace(changed, mesh=MeshConfig())


def _write_backbone(checkpoint: Checkpoint, settings: dict[str, Any], out: Path) -> None:
    """The LM of the directory as a model directory of its own, its tensors byte for byte."""
    prefix = settings["run"]["backbone_prefix"]
    out.mkdir()
    copy_companions(checkpoint.directory, out)
    (out / "config.json").write_text(json.dumps(settings["backbone_config"], indent=2) + "\n", encoding="utf-8")

    held = {name: tensor for name, tensor in checkpoint.stored.items() if name.startswith(prefix)}
    write_tensors(out, ((name.removeprefix(prefix), tensor) for name, tensor in held.items()))


def _with_projector(model: Model, checkpoint: Checkpoint, names: Mapping[str, str]) -> Model:
    """The model with the checkpoint's projector, in float32, on the devices that its own was on."""
    projector = {}
    for name, leaf in model.params["projector"].items():
        stored = f"projector.{names.get(name, name)}"
        value = checkpoint.stored.get(stored)
        if value is None or value.shape != leaf.shape[::-1]:
            raise UserError(f"{checkpoint.directory}: no tensor {stored} of shape {leaf.shape[::-1]}; export it again")
        with np.errstate(over="ignore"):
            held = np.array(value.T, leaf.dtype, order="C")
        if not np.isfinite(held).all():
            raise UserError(f"{checkpoint.directory}: {stored} holds NaN or infinity; export it again")
        projector[name] = jax.device_put(held, leaf.sharding)
    return dataclasses.replace(model, params={**model.params, "projector": projector})


def _first_position(model: Model, config: Config) -> dict[str, Any]:
    """Gives the position where the data of a run begins, whatever the data."""
    nobody = Vectors.of(np.zeros((0, 1), np.float32))
    nothing = PackedDataset(Examples.of(()), nobody, Ragged.of(()), Budget(config.data.seq_len, 1, 1), 1)
    train = config.train
    iterator = train_iterator(nothing, model.mesh, batch_rows=train.rows, steps=train.steps, seed=train.seed)
    return iterator.get_state()
