"""Two exports: one that writes a file, one that returns lines."""

import json
from pathlib import Path
from typing import Any

from e2p_jax.train.run import Run


def export_norms(run: Run, out: Path, users: tuple[str, ...]) -> None:
    out.write_text(json.dumps({"users": users, "kind": run.inputs.config.projector.kind}))


def list_names(run: Run, prompt: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "leaves": sorted(run.model.params["projector"])}]
