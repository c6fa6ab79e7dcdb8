"""The run's backbone as a Hugging Face directory: what a run that trained it leaves behind."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from e2p_jax.backbone import weights
from e2p_jax.backbone.lora import merge
from e2p_jax.backbone.quantize import full
from e2p_jax.errors import UserError
from e2p_jax.train.run import Run


def export_backbone(run: Run, out: Path, dtype: str) -> None:
    """Writes config, tokenizer and safetensors; adapters are merged into the matrices beside which they stand.

    What was quantised is written as the values that it stands for: what the adapters were trained beside.

    Raises:
      UserError: `out` exists and is no model directory, or holds the run's own backbone.
    """
    if out.exists() and (not (out / "config.json").is_file() or out.resolve() == run.inputs.directory.resolve()):
        raise UserError(f"--out {out}: exists and is not an earlier export; choose another directory")
    params = run.model.params["backbone"]
    layers = merge(full(params["layers"]), run.model.params.get("lora", {}))
    backbone = weights.abstract(run.inputs.decoder, dtype=jnp.dtype(dtype))
    nnx.update(backbone, {**params, "layers": layers})
    weights.save(backbone, run.inputs.directory, out, jnp.dtype(dtype))
