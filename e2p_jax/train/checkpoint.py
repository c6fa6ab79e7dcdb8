"""Orbax checkpoints: the trainable part, the projector with its statistics, optimizer, RNG, step, data position.

The frozen backbone is never written; `backbone.json` in the run directory names it by path, revision and fingerprint.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from e2p_jax.errors import UserError
from e2p_jax.train.partition import path_name
from e2p_jax.train.step import TrainState

PyTree = Any


def _flatten(tree: PyTree) -> dict[str, jax.Array]:
    """Leaves by path, so that the empty nodes of the frozen part leave no trace on disk."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unflatten(tree: PyTree, leaves: dict[str, jax.Array]) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], tree)


class Checkpoints:
    """The `checkpoints/<step>/` of a run: the last one and the best one are kept."""

    def __init__(self, run: Path):
        keep = [
            policies.LatestN(1),
            policies.BestN(get_metric_fn=lambda m: -m["nll"], n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=lambda metrics: metrics["nll"],
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self.directory = (run / "checkpoints").absolute()
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "statistics": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def step_of(self, which: str) -> int:
        """`best` (lowest evaluation NLL), `last`, or a number.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self.directory}: no checkpoint yet; run `e2p train` first")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if not which.isdigit() or int(which) not in steps:
            raise UserError(f"--checkpoint {which}: {self.directory} has best, last and {steps}")
        return int(which)

    def save(self, state: TrainState, statistics: PyTree, data: dict[str, Any], nll: float | None) -> None:
        """Writes in the background; `nll` is the evaluation result at this step, if there is one."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flatten(state._replace(key=jax.random.key_data(state.key)))),
                statistics=ocp.args.StandardSave(_flatten(statistics)),
                data=ocp.args.JsonSave(data),
            ),
            metrics=None if nll is None else {"nll": nll},
        )

    def restore(self, step: int, state: TrainState, statistics: PyTree) -> tuple[TrainState, PyTree, dict[str, Any]]:
        """Reads a checkpoint onto the shardings of the given state, whatever mesh it was saved from.

        Raises:
          UserError: the checkpoint does not fit this config.
        """
        raw = state._replace(key=jax.random.key_data(state.key))
        abstract = {
            name: jax.tree.map(ocp.tree.to_shape_dtype_struct, _flatten(tree))
            for name, tree in (("state", raw), ("statistics", statistics))
        }
        metadata = self._manager.item_metadata(step)
        for name, wanted in abstract.items():
            there = {path: leaf.shape for path, leaf in metadata[name].items()}
            here = {path: leaf.shape for path, leaf in wanted.items()}
            for path in sorted(there.keys() | here.keys()):
                if there.get(path) != here.get(path):
                    raise UserError(
                        f"{self.directory / str(step)}: does not fit this run's config: {path} has shape "
                        f"{there.get(path)} there, {here.get(path)} here; use the config it was trained with"
                    )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract["state"]),
                statistics=ocp.args.StandardRestore(abstract["statistics"]),
                data=ocp.args.JsonRestore(),
            ),
        )
        raw = _unflatten(raw, restored["state"])
        key = jax.random.wrap_key_data(raw.key)
        return raw._replace(key=key), _unflatten(statistics, restored["statistics"]), restored["data"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
