"""The run's backbone as a Hugging Face directory: what a run that trained it leaves behind."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from e2p_jax.backbone import weights
from e2p_jax.backbone.adapter import by_matrix, merge
from e2p_jax.backbone.quantize import full
from e2p_jax.export.common import refuse_foreign, refuse_not_finite, settings_of
from e2p_jax.train.run import Run


def export_backbone(run: Run, out: Path, dtype: str) -> None:
    """Writes config, tokenizer and safetensors; adapters are merged into the matrices beside which they stand.

    What was quantised is written as the values that it stands for: what the adapters were trained beside.

    Raises:
      UserError: `out` holds something else, the run's own backbone or another model; or a parameter is not finite, or
        not in that dtype.
    """
    source = run.inputs.directory
    refuse_foreign(out, lambda there: there.resolve() != source.resolve() and _shape(there) == _shape(source))
    params = run.model.params["backbone"]
    kind = run.inputs.config.adapter.kind
    layers = merge(full(params["layers"]), by_matrix(kind, run.model.params.get(kind, {})))
    refuse_not_finite(run, {**params, "layers": layers}, jnp.dtype(dtype))
    backbone = weights.abstract(run.inputs.decoder, dtype=jnp.dtype(dtype))
    nnx.update(backbone, {**params, "layers": layers})
    weights.save(backbone, source, out, jnp.dtype(dtype))


def _shape(directory: Path) -> dict[str, object]:
    """Gives what two exports of a backbone have in common: its config, whatever their dtype."""
    return {key: value for key, value in settings_of(directory).items() if key not in ("dtype", "torch_dtype")}
