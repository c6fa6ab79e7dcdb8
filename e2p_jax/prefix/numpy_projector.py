"""The projector in NumPy, for a user whose vector came when the table of prefixes was made already."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from e2p_jax.errors import UserError
from e2p_jax.registry import PROJECTORS


def project(
    settings: Mapping[str, Any], parameters: Mapping[str, np.ndarray], vectors: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """[N, K, D], as `prefix.projector.Projector` gives them but for the rounding of float32.

    Args:
      settings: the section `projector` of the run's config, as a dictionary.
      parameters: every parameter and statistic by name.
      vectors: [N, E] float32, as they would stand in the table of user vectors.
      dtype: of the result; what comes before is float32.

    Raises:
      UserError: a kind without a NumPy form, no parameters, vectors of another width or not finite, or soft tokens that
        are not finite in that dtype.
    """
    kind = PROJECTORS[settings["kind"]].load() if settings["kind"] in PROJECTORS else None
    form = getattr(kind, "project_numpy", None)
    if form is None:
        raise UserError(
            f"projector.kind {settings['kind']} has no project_numpy: put the vector into the table of user vectors "
            "and rerun `e2p prefixes`"
        )
    if "input_mean" not in parameters:
        raise UserError("a table of an earlier version of e2p_jax, without the projector; rerun `e2p prefixes`")
    width = len(parameters["input_mean"])
    if vectors.ndim != 2 or vectors.shape[1] != width or not np.isfinite(vectors).all():
        raise UserError(f"vectors {vectors.shape}: give [N, {width}], every number finite")
    with np.errstate(over="ignore", invalid="ignore"):
        x = (vectors.astype(np.float32) - parameters["input_mean"]) / parameters["input_std"]
        y = form(parameters, x)
        if settings.get("shared_tokens"):
            y = np.concatenate([y, np.tile(parameters["shared"], (len(y), 1))], axis=1)
        y = y.reshape(len(x), settings["num_tokens"], -1)
        soft = parameters["token_mean"] + parameters["token_std"] * y
        if most := settings.get("max_scale", 0.0):
            calibrated = np.mean(np.square(parameters["token_mean"]) + np.square(parameters["token_std"]))
            bound = np.float32(most / settings["init_scale"]) * np.sqrt(calibrated)
            size = np.maximum(np.abs(soft).max(axis=-1, keepdims=True), np.float32(1e-20))
            unit = soft / size
            root = np.sqrt(np.maximum(np.mean(np.square(unit), axis=-1, keepdims=True), np.float32(1e-20)))
            soft = np.where(size * root > bound, unit * (bound / root), soft)
        soft = soft.astype(dtype)
    if len(bad := np.flatnonzero(~np.isfinite(soft.astype(np.float32)).all(axis=(1, 2)))):
        raise UserError(f"vector {bad[0]}: the soft tokens are not finite in {dtype.name}; repair the vector")
    return soft
