"""`e2p export`."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from e2p_jax.commands.common import RunPath
from e2p_jax.errors import UserError
from e2p_jax.registry import EXPORTS, described, one_of

_NEEDED = {"out": "--out DIR", "users": "--user", "prompt": "--prompt"}  # by formats that take them


def export(
    run: tyro.conf.Positional[RunPath],
    /,
    out: Path | None = None,
    format: Annotated[str, one_of(EXPORTS, described(EXPORTS))] = "transformers",
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
      format: One of `registry.EXPORTS`.
      include_backbone: With transformers: copy the backbone's tensors too; else they are named and
        fingerprinted, but for the embedded backbone, which always comes along.
      user: With peft and the engines: user ids, or @vector.npy (@@alice is the user @alice).
      prompt: With the engines: the user turn to answer.
      embeddings: With peft and the engines: table of user vectors to use in place of the run's.
      dtype: With backbone: of the written tensors.
      checkpoint: best, last, or a step.
    """
    from e2p_jax.files import explain_refusal, write_text
    from e2p_jax.train.run import open_run

    chosen = EXPORTS[format]
    given: dict[str, Any] = {"out": out, "users": user, "prompt": prompt}
    given |= {"format": format, "include_backbone": include_backbone, "dtype": dtype}
    flags = chosen.of(given)
    if any(flags.get(name, True) in (None, ()) for name in _NEEDED):
        needed = " and ".join(text for name, text in _NEEDED.items() if name in flags)
        raise UserError(f"--format {format}: give {needed}")
    made = chosen.load()(open_run(run, checkpoint, embeddings, backbone=chosen.backbone), **flags)
    if "out" not in flags:
        lines = "".join(json.dumps(value) + "\n" for value in made)
        if out is None:
            print(lines, end="")
            return
        with explain_refusal(out):
            write_text(out, lines)
    print(out)
