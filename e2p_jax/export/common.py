"""What exports share: what is refused before the work begins, and the tokenizer for others to load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from e2p_jax.backbone.weights import COMPANIONS
from e2p_jax.errors import UserError
from e2p_jax.files import explain_refusal
from e2p_jax.train.partition import PyTree, path_name, refuse_trained_backbone
from e2p_jax.train.run import Run


def refuse_not_of_users(run: Run) -> None:
    """For exports of soft tokens in front of the backbone as it was published.

    Raises:
      UserError: the run trained the backbone, or on no users' vectors (and no items, which are exported, too).
    """
    refuse_trained_backbone(run.model.mask)
    if run.inputs.catalogue is None:
        run.own_condition()


def refuse_not_finite(run: Run, params: PyTree, dtype: jnp.dtype | None = None) -> None:
    """
    Args:
      params: what is to be written.
      dtype: of what is written, if another.

    Raises:
      UserError: naming the first parameter that holds NaN or infinity, or would in that dtype.
    """
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(value if dtype is None else value.astype(dtype)).all():
            held = "holds NaN or infinity" if not jnp.isfinite(value).all() else f"holds more than {dtype} can say"
            remedy = "export an earlier step with --checkpoint" if "NaN" in held else "export with --dtype bfloat16"
            raise UserError(f"{run.directory}: step {run.step}: {path_name(path)} {held}; {remedy}")


def refuse_foreign(out: Path, is_ours: Callable[[Path], bool]) -> None:
    """
    Args:
      is_ours: whether a directory that is not empty is an earlier export of the same kind.

    Raises:
      UserError: what stands there would be lost.
    """
    with explain_refusal(out):
        taken = out.is_dir() and any(out.iterdir())
        ours = taken and is_ours(out)
    if taken and not ours:
        raise UserError(f"--out {out}: holds other files than an earlier export; choose another directory")


def settings_of(directory: Path) -> dict[str, Any]:
    """The `config.json` there; empty where there is none that can be read."""
    try:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


_TEMPLATE = "chat_template.jinja"
_NOT_ITS_OWN = ("config.json", "generation_config.json", "tokenizer_config.json", _TEMPLATE)


def save_tokenizer(run: Run, out: Path) -> None:
    """Copies the backbone's tokenizer files into `out` as they are, so that any version of transformers that knows the
    backbone's tokenizer knows this one, but for the chat template, which is the run's.
    """
    source = run.inputs.directory
    for name in COMPANIONS:
        if name not in _NOT_ITS_OWN and (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    config = source / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    settings.pop("chat_template", None)
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])  # transformers 4 adds token types
    (out / config.name).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / _TEMPLATE).write_text(run.inputs.encoder.template, encoding="utf-8")
