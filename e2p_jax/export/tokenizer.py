"""The tokenizer of a run, for others to load."""

import json
import shutil
from pathlib import Path

from e2p_jax.backbone.weights import COMPANIONS
from e2p_jax.train.run import Run

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
