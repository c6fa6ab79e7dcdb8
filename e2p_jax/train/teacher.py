"""The teacher of `train.distill`: the frozen backbone reads the training records with their context as text, once."""

import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from e2p_jax.data.pipeline import PackedDataset, eval_batches, pack
from e2p_jax.data.teacher import Teacher
from e2p_jax.data.training import cache_at_fault, cache_directory, check, vouch
from e2p_jax.errors import UserError
from e2p_jax.files import explain_full_disk, replace_directory
from e2p_jax.json_files import digest
from e2p_jax.parallel import distributed
from e2p_jax.terminal import say
from e2p_jax.train import identity
from e2p_jax.train.metrics import Progress
from e2p_jax.train.setup import Inputs, Model, jit_teacher_step
from e2p_jax.vectors.source import Vectors


def teach(dataset: PackedDataset, inputs: Inputs, model: Model) -> PackedDataset:
    """The training data with what the teacher makes of it: from `data.cache`, or worked out and kept there.

    Every process of a run calls it, and has all of it.

    Args:
      dataset: with the teacher's reading.
      model: as it is before training: a backbone that trains teaches what it was.

    Raises:
      UserError: no record has a context, or the cache cannot be written.
    """
    taught, weight = dataset.taught, inputs.config.train.distill
    assert taught is not None
    counts, own = taught.examples.target_counts, taught.own
    if not counts.any():
        raise UserError("train.distill: no training record has a `context` for the teacher to read; add it, or set 0")
    if (without := int((counts == 0).sum())) and distributed.is_first():
        say(f"train.distill: {without:,} of {own:,} conversations have no context and so no teacher")
    nobody = Vectors(np.zeros((1, model.embedding_width), np.float32), np.zeros(len(counts), np.int64))
    reading = pack(taught.examples, nobody, inputs.encoder)
    folder = cache_directory(inputs.config.data.cache)
    place = folder and folder / f"teacher-{_key(reading, inputs, model)}"
    # All work it out together, or none.
    if place and distributed.gather(np.array(_is_whole(place), np.int32)).all():
        teacher = Teacher.load(place, taught, weight)
    else:
        directory = folder or Path(tempfile.gettempdir())
        tokens = min(inputs.config.train.teacher_tokens, inputs.decoder.vocab_size)
        with explain_full_disk(directory):
            teacher = Teacher.empty(directory, taught, tokens, weight)
            _ask(teacher, reading, inputs, model)
        if folder and place:
            with cache_at_fault(folder):
                shutil.rmtree(place, ignore_errors=True)  # a damaged one
                with replace_directory(place) as temporary:
                    teacher.save(temporary)
                    vouch(temporary)
    budget = dataset.budget._replace(taught=teacher.ids.shape[1])
    return dataclasses.replace(dataset, teacher=teacher, budget=budget)


def _is_whole(place: Path) -> bool:
    try:
        check(place)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _key(reading: PackedDataset, inputs: Inputs, model: Model) -> str:
    """Names all that a teacher's answers depend on; mesh, kernels and rows change them by rounding alone."""
    train, backbone, held = inputs.config.train, inputs.config.backbone, reading.examples
    settings = [train.teacher_tokens, train.teacher_temperature, backbone.quantization]
    read = hashlib.sha256()
    for array in (held.tokens, held.is_target, held.ends):
        read.update(np.ascontiguousarray(array).data)
    return digest([*identity.describe(inputs, model), settings, read.hexdigest()])[:32]


def _ask(teacher: Teacher, reading: PackedDataset, inputs: Inputs, model: Model) -> None:
    """Works out what the teacher expects, and writes it down."""
    train, counts = inputs.config.train, reading.examples.target_counts
    batches = -(-len(reading.rows) // train.rows)
    step = jit_teacher_step(model, teacher.ids.shape[1], train.teacher_temperature)
    with contextlib.closing(Progress(batches, 0, "teacher")) as progress, jax.set_mesh(model.mesh):
        for number, (batch, members) in enumerate(eval_batches(reading, model.mesh, train.rows), 1):
            ids, log_probs = jax.device_get(step(model.params, batch))
            for row, numbers in enumerate(members):
                ends = np.cumsum(counts[numbers])
                for end, count, last in zip(ends, counts[numbers], teacher.ends[numbers], strict=True):
                    teacher.ids[last - count : last] = ids[row, end - count : end]
                    teacher.log_probs[last - count : last] = log_probs[row, end - count : end]
            progress.update(number, "", show=number in (1, batches) or number % 50 == 0)
