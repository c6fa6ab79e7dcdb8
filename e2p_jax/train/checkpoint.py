"""Orbax checkpoints: the trainable part, the projector with its statistics, optimizer, RNG, step, data position.

The frozen backbone is never written; `backbone.json` in the run directory names it by path, revision and fingerprint.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from e2p_jax.config import TrainConfig
from e2p_jax.errors import UserError
from e2p_jax.files import in_bucket, move_directory
from e2p_jax.parallel import distributed
from e2p_jax.train.manifest import find_damage, write_manifest
from e2p_jax.train.partition import path_name
from e2p_jax.train.step import TrainState

PyTree = Any
_REMOVED = ".removed"  # where steps go at once that are no longer kept, so that none is ever there in part


def _rank(metrics: dict[str, float]) -> float:
    """Its NLL; runs of earlier versions hold some that are not finite, and no order of numbers knows what to do."""
    nll = metrics.get("nll")
    return nll if isinstance(nll, float) and math.isfinite(nll) else math.inf


_BEST: dict[str, Any] = {"best_fn": _rank, "best_mode": "min"}


def _flatten(tree: PyTree) -> dict[str, jax.Array]:
    """Leaves by path, so that the empty nodes of the frozen part leave no trace on disk."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unflatten(tree: PyTree, leaves: dict[str, jax.Array]) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], tree)


def _restore_args(tree: dict[str, jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
    """Of all that is there, what is in `tree`."""
    args = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(tree, restore_args=args, partial_restore=True)


def newest_step(run: epath.Path) -> int | None:
    """The step of a run's newest checkpoint; None where there is none, or it is damaged."""
    place = run / "checkpoints"
    step = max(ocp.utils.checkpoint_steps(place), default=None)
    return None if step is None or find_damage(place / str(step)) else step


class Checkpoints:
    """The `checkpoints/<step>/` of a run."""

    def __init__(self, run: epath.PathLike, settings: TrainConfig | None = None):
        """Opens them to write as well where `settings` say how many of the last and the best stay, else to read.

        What a crash left half-written is then removed, and what is damaged moved to `damaged/<step>` in the run
        directory and named in `damaged`, as long as another checkpoint is whole.

        Raises:
          UserError: every checkpoint is damaged, or the directory cannot be read.
        """
        run = epath.Path(run)
        self.directory = (run if in_bucket(run) else run.absolute()) / "checkpoints"
        self.damaged: list[str] = []
        self._saving: int | None = None
        if settings is None:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0, **_BEST)
        else:
            if distributed.is_first():
                self._move_damaged()
            distributed.wait_for_all("checkpoints are verified")
            kept = [
                policies.LatestN(settings.keep_last),
                policies.BestN(
                    get_metric_fn=_rank, reverse=True, n=settings.keep_best, keep_checkpoints_without_metrics=False
                ),
            ]
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
                todelete_subdir=_REMOVED,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
                **_BEST,
            )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(),
            "statistics": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        }
        with self._explained():
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self._writes = settings is not None
        self._remove()

    def _remove(self) -> None:
        if self._writes and distributed.is_first():
            shutil.rmtree(self.directory / _REMOVED, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Orbax, TensorStore and what reads JSON each have errors of their own for what is not as it was written.

        Raises:
          UserError: naming the checkpoints that are damaged, or saying what they say.
        """
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if "No space left" in str(error):
                raise
            with contextlib.suppress(OSError):
                found = {step: find_damage(self.directory / str(step)) for step in self._steps()}
                said = "; ".join(f"{step}: {damage}" for step, damage in found.items() if damage)
            said = said or f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            raise UserError(
                f"{self.directory}: cannot be read ({said}); move what is damaged away, or restore a copy"
            ) from error

    def _steps(self) -> list[int]:
        return sorted(ocp.utils.checkpoint_steps(self.directory))

    def _move_damaged(self) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory}: is a file; move it away")
        steps = self._steps()
        found = {step: find_damage(self.directory / str(step)) for step in steps}
        broken = {step: damage for step, damage in found.items() if damage}
        if steps and len(broken) == len(steps):
            said = "; ".join(f"{step}: {damage}" for step, damage in broken.items())
            raise UserError(
                f"{self.directory}: every checkpoint is damaged ({said}); restore a copy, or start a new run"
            )
        for step, damage in broken.items():
            place = self.directory.parent / "damaged" / str(step)
            if place.exists():
                place.rmtree()
            move_directory(self.directory / str(step), place)
            self.damaged.append(f"{self.directory / str(step)}: {damage}; moved to {place}")

    def _write_manifest(self) -> None:
        """Called by Orbax when all is written and the directory still has its temporary name, or its commit file
        is still to come where storage cannot rename.
        """
        if distributed.is_first():
            (place,) = (path for path in self.directory.iterdir() if path.name.partition(".")[0] == str(self._saving))
            write_manifest(place)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def step_of(self, which: str) -> int:
        """`best` (lowest evaluation NLL; the last one where none is known), `last`, or a number.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self.directory}: no checkpoint yet; run `e2p train` first")
        if which == "last":
            return steps[-1]
        if which == "best":
            with self._explained():
                best = self._manager.best_step()
                metrics = None if best is None else self._manager.metrics(best)
            return best if metrics and math.isfinite(_rank(metrics)) else steps[-1]
        if not which.isdigit() or int(which) not in steps:
            raise UserError(f"--checkpoint {which}: {self.directory} has best, last and {steps}")
        return int(which)

    def check(self, step: int) -> None:
        """Holds a checkpoint's files against their SHA-256.

        Raises:
          UserError: naming the file that is damaged.
        """
        if damage := find_damage(self.directory / str(step)):
            others = [other for other in sorted(self._manager.all_steps()) if other != step]
            raise UserError(f"{self.directory / str(step)}: {damage}; choose another with --checkpoint: {others}")

    def save(self, state: TrainState, statistics: PyTree, data: dict[str, Any], nll: float | None) -> None:
        """Writes in the background; `nll` is the evaluation result at this step, if there is one.

        Raises:
          ValueError: it is not finite.
        """
        if nll is not None and not math.isfinite(nll):
            raise ValueError(f"an NLL of {nll} ranks nothing")
        self.wait()
        self._saving = int(state.step)
        self._manager.save(
            self._saving,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(_flatten(state._replace(key=jax.random.key_data(state.key)))),
                statistics=ocp.args.PyTreeSave(_flatten(statistics)),
                data=ocp.args.JsonSave(data),
            ),
            metrics=None if nll is None else {"nll": nll},
        )

    def restore(
        self, step: int, state: TrainState, statistics: PyTree, only: Callable[[str], bool] = lambda path: True
    ) -> tuple[TrainState, PyTree, dict[str, Any]]:
        """Reads a checkpoint onto the shardings of the given state, whatever mesh it was saved from.

        Args:
          state: arrays, or their shapes (`setup.abstract_state`).
          statistics: likewise.
          only: path in `state` -> whether it is read; the rest stays what was given, its shape checked all the same.

        Raises:
          UserError: the checkpoint does not fit this config, or holds parameters that are not finite.
        """
        place = state.key.sharding
        raw = state._replace(key=jax.eval_shape(jax.random.key_data, state.key).update(sharding=place))
        abstract = {
            name: jax.tree.map(ocp.tree.to_shape_dtype_struct, _flatten(tree))
            for name, tree in (("state", raw), ("statistics", statistics))
        }
        with self._explained():
            metadata = self._manager.item_metadata(step)
            shapes = {name: {path: leaf.shape for path, leaf in metadata[name].items()} for name in abstract}
        for name, wanted in abstract.items():
            there = shapes[name]
            here = {path: leaf.shape for path, leaf in wanted.items()}
            for path in sorted(there.keys() | here.keys()):
                if there.get(path) != here.get(path):
                    raise UserError(
                        f"{self.directory / str(step)}: does not fit this run's config: {path} has shape "
                        f"{there.get(path)} there, {here.get(path)} here; use the config it was trained with"
                    )
        abstract["state"] = {path: leaf for path, leaf in abstract["state"].items() if path == "step" or only(path)}
        with self._explained():
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    data=ocp.args.JsonRestore(), **{name: _restore_args(tree) for name, tree in abstract.items()}
                ),
            )
        raw = _unflatten(raw, _flatten(raw) | restored["state"])
        if int(raw.step) != step:
            raise UserError(f"{self.directory / str(step)}: holds step {int(raw.step)}; give it that name again")
        learned = [leaf for leaf in jax.tree.leaves(raw.trainable) if isinstance(leaf, jax.Array)]
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in learned):
            raise UserError(
                f"{self.directory / str(step)}: holds parameters that are not finite (earlier versions saved them); "
                "move it away to resume from the one before, or choose another with --checkpoint"
            )
        key = jax.random.wrap_key_data(raw.key) if isinstance(raw.key, jax.Array) else state.key
        return raw._replace(key=key), _unflatten(statistics, restored["statistics"]), restored["data"]

    def projector(self, step: int) -> dict[str, np.ndarray]:
        """A checkpoint's projector, what was trained of it and what was not, by the names of its parameters.

        Raises:
          UserError: it holds none, it is damaged, or not finite.
        """
        prefix = "trainable/projector/"
        with self._explained():
            metadata = self._manager.item_metadata(step)
            wanted = {
                name: {
                    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                    for path, leaf in metadata[name].items()
                    if name == "statistics" or path.startswith(prefix)
                }
                for name in ("state", "statistics")
            }
            args = {
                name: ocp.args.PyTreeRestore(
                    tree, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree), partial_restore=True
                )
                for name, tree in wanted.items()
            }
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        found = {path.removeprefix(prefix): value for tree in restored.values() for path, value in tree.items()}
        if not all(np.isfinite(value).all() for value in found.values()):
            raise UserError(f"{self.directory / str(step)}: its projector is not finite; start from another run")
        return found

    def wait(self) -> None:
        self._manager.wait_until_finished()
        self._remove()

    def close(self) -> None:
        self._manager.close()
        self._remove()
