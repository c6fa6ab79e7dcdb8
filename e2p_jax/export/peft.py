"""Users' prefixes as stock PEFT prompt-tuning adapters (Lester et al., arXiv 2104.08691; PEFT's PROMPT_TUNING)."""

import json
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from e2p_jax.backbone.weights import EMBEDDED
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import asked_for
from e2p_jax.files import replace_directory
from e2p_jax.train.partition import refuse_trained_backbone
from e2p_jax.train.run import Run


def export_peft(run: Run, out: Path, users: Sequence[str]) -> None:
    """Writes `out/<user>/adapter_config.json` and `adapter_model.safetensors`: `PeftModel.from_pretrained` needs no
    code of ours to load them in front of the run's backbone.

    Args:
      users: ids in the run's table of user vectors, `@vector.npy`, or `@@alice` for the user `@alice`.

    Raises:
      UserError: no users, an unknown one, a placement that PEFT has no word for, or a trained backbone.
    """
    config, decoder = run.inputs.config, run.inputs.decoder
    refuse_trained_backbone(run.model.mask)
    if not users:
        raise UserError("--format peft writes one adapter a user: name them with --user")
    if config.prefix.placement != "before_bos":
        raise UserError(
            f"PEFT puts a prompt's soft tokens before BOS, this run's stand {config.prefix.placement}; "
            "export --format transformers, or train with prefix.placement=before_bos"
        )
    path, revision = run.inputs.published()
    names, vectors = asked_for(run, users)
    soft = np.asarray(nnx.merge(run.model.graph, run.model.params).projector(vectors))  # [N, K, D]
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": config.projector.num_tokens,
        "token_dim": decoder.hidden_size,
        "num_transformer_submodules": 1,
        "num_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "base_model_name_or_path": str(EMBEDDED) if path == "embedded" else path,
        "revision": revision,
        "inference_mode": True,
    }
    with replace_directory(out) as temporary:
        for user, prefix in zip(names, soft, strict=True):
            place = temporary / urllib.parse.quote(user.removeprefix("@"), safe="")
            place.mkdir()
            (place / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
            save_file({"prompt_embeddings": prefix}, place / "adapter_model.safetensors", metadata={"format": "pt"})
            (place / "adapter_model.safetensors").chmod(0o644)
