"""The run's backbone as a Hugging Face directory: what a run that trained it leaves behind."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from e2p_jax.backbone import weights
from e2p_jax.backbone.lora import merge
from e2p_jax.errors import UserError
from e2p_jax.train.run import Run


def export_backbone(run: Run, out: Path, dtype: str) -> None:
    """Writes config, tokenizer and safetensors; adapters are merged into the matrices beside which they stand.

    Raises:
      UserError: `out` exists and is no model directory, or holds the run's own backbone.
    """
    if out.exists() and (not (out / "config.json").is_file() or out.resolve() == run.inputs.directory.resolve()):
        raise UserError(f"--out {out}: exists and is not an earlier export; choose another directory")
    model = nnx.merge(run.model.graph, run.model.params)
    if "lora" in run.model.params:
        merged = merge(run.model.params["backbone"]["layers"], run.model.params["lora"])
        nnx.update(model.backbone.layers, merged)
    weights.save(model.backbone, run.inputs.directory, out, jnp.dtype(dtype))
