"""A run as a Hugging Face model directory: config, projector, tokenizer, modelling code, model card."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from e2p_jax.backbone.convert import hugging_face_tensors
from e2p_jax.backbone.families import language_config
from e2p_jax.backbone.flax_checkpoint import FlaxCheckpoint
from e2p_jax.backbone.tensor_files import Checkpoint, Spelling, fingerprint, spelling
from e2p_jax.backbone.weights import has_name, open_checkpoint
from e2p_jax.config import ProjectorConfig
from e2p_jax.evaluate.measures import value_text
from e2p_jax.export.common import refuse_foreign, refuse_not_finite, refuse_not_of_users, save_tokenizer, settings_of
from e2p_jax.export.slot import reply_opening, user_turn
from e2p_jax.files import replace_directory
from e2p_jax.prefix.projector import kind_of
from e2p_jax.registry import PROJECTORS
from e2p_jax.tensors import SHARD_BYTES, write_tensors
from e2p_jax.train.run import Run

REMOTE_CODE = Path(__file__).parent / "remote_code"
CLASSES = {
    "AutoConfig": "configuration_e2p.E2PConfig",
    "AutoModelForCausalLM": "modeling_e2p.E2PForCausalLM",
}


def export_transformers(run: Run, out: Path, include_backbone: bool) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` and `AutoTokenizer` load.

    Args:
      include_backbone: copy the LM's tensors as well, byte for byte; else they are named by path, revision and
        fingerprint. The embedded backbone and a GGUF file have no name that others could load them by, and always
        come along; what is worked out of a file's tensors is written in the dtype that the run opens them in.

    Raises:
      UserError: the run trained the backbone itself or on no users' vectors, its projector or head over items holds
        NaN, or `out` holds something else.
    """
    refuse_not_of_users(run)
    refuse_foreign(out, lambda there: settings_of(there).get("model_type") == "e2p")
    refuse_not_finite(run, {name: run.model.params[name] for name in run.model.params.keys() & {"projector", "items"}})
    include_backbone = include_backbone or not has_name(run.inputs.directory, run.inputs.published()[0])
    with replace_directory(out) as temporary:
        digest = _write_weights(run, temporary, include_backbone)
        settings = _config(run, include_backbone, digest)
        (temporary / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (temporary / "generation_config.json").write_text(json.dumps(_generation_config(run), indent=2) + "\n")
        if catalogue := run.inputs.catalogue:
            held: dict[str, Any] = {"ids": list(catalogue.table.ids)}
            held["openings"] = list(map(run.opening, held["ids"])) if run.opening else []
            (temporary / "items.json").write_text(json.dumps(held) + "\n")
        save_tokenizer(run, temporary)
        for source in REMOTE_CODE.glob("*_e2p.py"):
            shutil.copyfile(source, temporary / source.name)
        with (temporary / "modeling_e2p.py").open("a", encoding="utf-8") as code:
            code.writelines(f"\n\n{kind_of(name).TORCH}" for name in PROJECTORS)
        (temporary / "README.md").write_text(model_card(run), encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod(0o644)


def _config(run: Run, include_backbone: bool, digest: str) -> dict[str, Any]:
    config = run.inputs.config
    named: dict[str, Any] | None = None
    if not include_backbone:
        path, revision = run.inputs.published()
        named = {"path": path, "revision": revision, "fingerprint": digest}
        if run.inputs.decoder.wrapped:
            spelled = _spelling(run)
            named["key_mapping"] = {f"^{spelled.model}": spelled.root, f"^{spelled.head}lm_head": "lm_head"}
    backbone = language_config(json.loads((run.inputs.directory / "config.json").read_text(encoding="utf-8")))
    if include_backbone:
        backbone.pop("quantization_config", None)
    placement = config.prefix.placement
    shared = {field.name for field in dataclasses.fields(ProjectorConfig)}
    own = {name: value for name, value in dataclasses.asdict(config.projector).items() if name not in shared}
    return {
        "model_type": "e2p",
        "architectures": ["E2PForCausalLM"],
        "auto_map": CLASSES,
        "dtype": run.model.params["backbone"]["embedding"].dtype.name,
        "backbone_config": backbone,
        "backbone": named,
        "placement": placement,
        "user_turn": user_turn(run.inputs.encoder) if placement == "in_chat" else None,
        "reply_opening": reply_opening(run.inputs.encoder) if placement == "before_reply" else None,
        "num_soft_tokens": config.projector.num_tokens,
        "num_shared_tokens": config.projector.shared_tokens,
        "embedding_size": run.model.embedding_width,
        "max_soft_token_rms": float(run.model.merged.projector.bound) or None,
        "projector_kind": config.projector.kind,
        **{f"projector_{name}": value for name, value in own.items()},
        "null_user": config.train.null_user_rate > 0,
        "num_items": len(run.inputs.catalogue or ()),
        "item_size": config.items.width,
        "item_token": run.inputs.catalogue is not None and config.items.token,
        "run": {
            "config": dataclasses.asdict(config.portable()),
            "step": run.step,
            "fingerprint": digest,
            "backbone_prefix": _backbone_prefix(run),
        },
    }


def _generation_config(run: Run) -> dict[str, Any]:
    path = run.inputs.directory / "generation_config.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own.pop("transformers_version", None)
    return own | {"eos_token_id": list(run.inputs.encoder.stops), "pad_token_id": run.inputs.encoder.pad_id}


def _write_weights(run: Run, out: Path, include_backbone: bool) -> str:
    """Returns the fingerprint of the backbone's tensors as whoever reads `out` has them."""
    names = kind_of(run.inputs.config.projector.kind).TORCH_NAMES
    projector = {
        f"projector.{names.get(name, name)}": np.asarray(value).T
        for name, value in run.model.params["projector"].items()
    }
    if head := run.model.params.get("items"):
        items = {"rows": run.model.merged.items.rows(), "query.weight": head["query"].T}
        items |= {"query.bias": head["query_bias"]}
        if "token" in head:
            items |= {"said": head["said"], "token.weight": head["token"].T}
        projector |= {f"item_head.{name}": np.asarray(value) for name, value in items.items()}
    spelled, prefix = _spelling(run), _backbone_prefix(run)
    dtype = run.model.params["backbone"]["embedding"].dtype
    held = hugging_face_tensors(run.inputs.directory, dtype) if include_backbone else ()
    plain = ((spelled.plain(name), tensor) for name, tensor in held)  # of a wrapper, its language model's
    backbone = ((f"backbone.{name}", tensor) for name, tensor in plain if name is not None)
    # Beside a backbone that is named the code looks for one file.
    write_tensors(out, itertools.chain(projector.items(), backbone), SHARD_BYTES if include_backbone else math.inf)
    source = open_checkpoint(run.inputs.directory)
    as_they_are = isinstance(source, FlaxCheckpoint) or not source.worked_out
    if not include_backbone or (as_they_are and not run.inputs.decoder.wrapped):
        return run.model.fingerprint
    written = Checkpoint(out).stored.items()
    return fingerprint({name.removeprefix(prefix): tensor for name, tensor in written if name.startswith(prefix)})


def _backbone_prefix(run: Run) -> str:
    """Gives what the exported names of the backbone's tensors have in front of the source's, if they are its own."""
    spelled = _spelling(run)
    return f"backbone.{'' if spelled.model else spelled.root}"


def _spelling(run: Run) -> Spelling:
    return spelling(run.inputs.decoder, open_checkpoint(run.inputs.directory).names())


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [embedding-to-prefix, e2p_jax]
---

# Embedding-to-Prefix: {backbone}

A frozen LM and a projector that turns a user's vector ({width} numbers) into {tokens} soft token(s), placed
`{placement}` ([arXiv 2505.17051](https://arxiv.org/abs/2505.17051)). Trained with e2p_jax, step {step}, seed {seed},
on `{data}`.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", padding_side="left", trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
messages = [[{{"role": "user", "content": "hi! what do you like?"}}]] * 2
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
)
vectors = torch.zeros(2, {width})  # one row per user, as they stand in your table of user vectors
output = model.generate(**inputs, user_embedding=vectors, max_new_tokens=32)
print(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`forward(..., user_embedding=...)` returns logits that are {tokens} position(s) longer than `input_ids`, the soft
token(s) included{places}. `model.backbone` is the LM without a prefix.
{items}{quantization}{results}"""

_ITEMS = """
It ranks a catalogue of {count} items (`items.json` has their ids), each as the answer:

```python
ids, scores = model.rank_items(**inputs, user_embedding=vectors, top_k=10)  # lists of ids, best first; [B, 10]
```
{said}"""

_SAID = """
`generate` puts the best item in front of the reply, so that its words follow: with `return_dict_in_generate=True` the
output's `item_ids` name it, and `generate(..., item_ids=[...])` has others there.
"""

_QUANTIZED = """
Trained, and measured below, in front of the LM with its layers' matrices in {kind}. Here it stands, or is named, as it
was published: what it scores differs by what the quantisation costs.
"""


def model_card(run: Run) -> str:
    """Writes what the model is, a runnable example, and what `e2p train` measured."""
    config = run.inputs.config.portable()
    backbone, kind = run.inputs.published()[0], config.backbone.quantization
    catalogue = run.inputs.catalogue
    items = _ITEMS.format(count=len(catalogue), said=_SAID * config.items.token) if catalogue else ""
    return _CARD.format(
        backbone=Path(backbone).name if Path(backbone).is_absolute() else backbone,
        width=run.model.embedding_width,
        tokens=config.projector.num_tokens,
        placement=config.prefix.placement,
        places=" (for each reply)" if config.prefix.placement == "before_reply" else "",
        step=run.step,
        seed=config.train.seed,
        data=config.data.path,
        items=items,
        quantization="" if kind == "none" else _QUANTIZED.format(kind=kind),
        results=_results(run),
    )


def _results(run: Run) -> str:
    path = run.directory / "report" / "evaluation.json"
    if not path.is_file():
        return ""
    lines = ["", "| split | condition | NLL per target token | perplexity per word |", "|---|---|---|---|"]
    for split in json.loads(path.read_text(encoding="utf-8"))["splits"]:
        for name, values in split["conditions"].items():
            perplexity = value_text("word_perplexity", {"value": values["word_perplexity"]})
            lines.append(f"| {split['split']} | {name} | {values['nll_per_target']:.4f} | {perplexity} |")
    return "\n".join(lines) + "\n"
