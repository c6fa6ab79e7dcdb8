"""`e2p export`."""

import json
from pathlib import Path
from typing import Literal

import tyro

from e2p_jax.commands.common import RunPath
from e2p_jax.errors import UserError
from e2p_jax.terminal import say


def export(
    run: tyro.conf.Positional[RunPath],
    /,
    out: Path | None = None,
    format: Literal["transformers", "peft", "vllm", "vllm-chat", "sglang", "backbone"] = "transformers",
    include_backbone: bool = False,
    user: tuple[str, ...] = (),
    prompt: str | None = None,
    embeddings: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    checkpoint: str = "best",
) -> None:
    """Writes what a run trained in another program's form.

    Args:
      run: Run directory.
      out: Directory to write; with vllm, vllm-chat and sglang a file. Default for those: stdout.
      format: transformers: a model directory for AutoModelForCausalLM; peft: a prompt-tuning adapter a user; vllm,
        vllm-chat, sglang: a line of JSON a user, the body of a request to /v1/completions, /v1/chat/completions,
        /generate; backbone: a model directory of the backbone alone, for a run that trained it.
      include_backbone: With transformers: copy the backbone's tensors too; else they are named and
        fingerprinted, but for the embedded backbone, which always comes along.
      user: With peft and the engines: user ids, or @vector.npy (@@alice is the user @alice).
      prompt: With the engines: the user turn to answer.
      embeddings: With peft and the engines: table of user vectors to use in place of the run's.
      dtype: With backbone: of the written tensors.
      checkpoint: best, last, or a step.
    """
    from e2p_jax.export.backbone import export_backbone
    from e2p_jax.export.engines import export_engine
    from e2p_jax.export.peft import CAVEAT, export_peft
    from e2p_jax.export.transformers import export_transformers
    from e2p_jax.files import explain_refusal, write_text
    from e2p_jax.train.run import open_run

    if format in ("vllm", "vllm-chat", "sglang"):
        if not user or prompt is None:
            raise UserError(f"--format {format}: give --user and --prompt")
        bodies = export_engine(open_run(run, checkpoint, embeddings, backbone="embedding"), format, user, prompt)
        lines = "".join(json.dumps(body) + "\n" for body in bodies)
        if out is None:
            print(lines, end="")
            return
        with explain_refusal(out):
            write_text(out, lines)
        print(out)
        return
    if out is None:
        raise UserError(f"--format {format}: give --out DIR")
    opened = open_run(run, checkpoint, embeddings, backbone="all" if format == "backbone" else "none")
    if format == "transformers":
        export_transformers(opened, out, include_backbone)
    elif format == "peft":
        export_peft(opened, out, user)
        say(f"{CAVEAT}; whose directory is which stands in {out / 'users.json'}")
    else:
        export_backbone(opened, out, dtype)
    print(out)
