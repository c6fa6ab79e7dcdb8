"""Names what a run stands on: written into its directory when it is claimed, checked whenever it is opened.

`backbone.json` names the backbone (path, revision, fingerprint of its weights, what of its `config.json` has a say,
digests of its tokenizer and of the chat template), the width of the user vectors, and those settings that the run was
begun with which change its result. Its last key is a checksum over the others. Earlier versions wrote the first three
and the width alone, or all settings.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from etils import epath

from e2p_jax.backbone.families import parse_config, significant
from e2p_jax.backbone.tensor_files import kept, stamp
from e2p_jax.config import Config
from e2p_jax.config_fields import fields_that
from e2p_jax.config_versions import upgraded
from e2p_jax.data.control import unguarded
from e2p_jax.data.encode import Encoder
from e2p_jax.errors import UserError
from e2p_jax.files import file_digest, write_text
from e2p_jax.json_files import digest, is_digest, read_object, sealed, unseal
from e2p_jax.parallel.distributed import is_first
from e2p_jax.train.setup import Inputs, Model

NAME, TEMPLATE = "backbone.json", "chat_template.jinja"

_KINDS: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "revision": (str, type(None)),
    "fingerprint": str,
    "embedding_width": int,
}
_LATER: dict[str, type] = {"config": dict, "tokenizer": str, "chat_template": str, "settings": dict}

# What decides how a checkpoint's numbers are read: with another value they mean something else.
_BINDING = ("prefix", "projector", "adapter")

# A text whose tokens tell tokenizers apart that have the same files, but classes of their own.
_PROBE = "The user's 1st line,\n\n  isn't it?\tÜber 3.14 % ... naïve — 今日は 안녕 привет 🙂\r\n def f(x): x_1+2\n"


def write(run: epath.Path, config: Config, inputs: Inputs, model: Model) -> None:
    """Writes `backbone.json` and the chat template."""
    names = {
        "path": config.backbone.path,
        "revision": config.backbone.revision,
        "fingerprint": model.fingerprint,
        "embedding_width": model.embedding_width,
        "config": significant(_config_json(inputs.directory)),
        "tokenizer": tokenizer_digest(inputs.directory, inputs.encoder),
        "chat_template": _sha256(unguarded(inputs.encoder.template)),
        "settings": settings(config),
    }
    write_text(run / TEMPLATE, inputs.encoder.template)
    write_text(run / NAME, sealed(names))


def read(run: epath.Path) -> dict[str, Any]:
    """Reads what `write` wrote, whole.

    Raises:
      UserError: missing, damaged or altered.
    """
    path = run / NAME

    def damaged(reason: str) -> UserError:
        return UserError(f"{path}: damaged or altered ({reason}); restore it from a copy of the run")

    names = unseal(read_object(path, "restore it from a copy of the run"), damaged)
    kinds = _KINDS | (_LATER if _LATER.keys() & names.keys() else {})
    if names.keys() != kinds.keys():
        raise damaged(f"it has the keys {sorted(names)}")
    for key, kind in kinds.items():
        if not isinstance(names[key], kind) or isinstance(names[key], bool):
            raise damaged(f"{key} is {str(names[key])[:60]!r}")
    if names["embedding_width"] < 1 or not (is_digest(names["fingerprint"]) or names["fingerprint"] == "random"):
        raise damaged("no width of user vectors, or no fingerprint")
    return names


def check_inputs(run: epath.Path, names: dict[str, Any], config: Config, inputs: Inputs) -> None:
    """Holds what a run is opened with, before any weight is read, against what it was begun with.

    Args:
      names: of `read`.
      config: what the run's `config.json` says now.
      inputs: read by that config.

    Raises:
      UserError: the backbone's config.json, tokenizer or chat template, or a setting that the projector depends on,
        is another one; or vectors have another width.
    """
    width, table = names["embedding_width"], inputs.table
    if table is not None and table.width != width:
        raise UserError(f"{table.source}: vectors have width {table.width}, but the run's projector takes {width}")
    if "config" not in names:
        _say(
            f"{run / NAME}: written by an earlier version, which did not note config.json, tokenizer and chat template "
            "of the backbone: that they are the same as in training could not be checked, the template aside"
        )
        if (run / TEMPLATE).exists():
            _check_template(run, _written(run / TEMPLATE), inputs)
        return
    place = inputs.directory
    try:
        same = parse_config(names["config"], run / NAME, config.backbone.ignored_keys) == inputs.decoder
    except UserError:  # it says less than this version asks for
        same = False
    if not same:
        raise UserError(
            f"{place / 'config.json'}: changed since {run} was trained: "
            f"{_differences(names['config'], significant(_config_json(place)))}; restore what it said"
        )
    if tokenizer_digest(place, inputs.encoder) != names["tokenizer"]:
        raise UserError(
            f"{place}: the tokenizer (tokenizer.json, its special or added tokens) changed since {run} was trained; "
            "restore its files"
        )
    _check_template(run, names["chat_template"], inputs)
    _check_settings(run, upgraded(names["settings"]), settings(config))


def check_weights(run: epath.Path, names: dict[str, Any], model: Model) -> None:
    """
    Raises:
      UserError: the backbone's weights are not those that the run was trained in front of.
    """
    if names["fingerprint"] != model.fingerprint:
        raise UserError(
            f"{run}: was trained in front of other weights than {names['path']} holds now "
            f"(fingerprint {names['fingerprint'][:12]}, found {model.fingerprint[:12]}); restore that backbone"
        )


def describe(inputs: Inputs, model: Model) -> list[Any]:
    """All of a backbone and its template that numbers and replies depend on, for keys of what is kept."""
    return [
        model.fingerprint,
        model.params["backbone"]["embedding"].dtype.name,
        dataclasses.asdict(inputs.decoder),
        tokenizer_digest(inputs.directory, inputs.encoder),
        inputs.encoder.template,
        inputs.encoder.stops,
    ]


def tokenizer_digest(directory: Path, encoder: Encoder) -> str:
    """SHA-256 of how text becomes tokens: the files, special and added tokens, and the tokens of a probe.

    Of `tokenizer.json` it is the content, whatever its layout, without padding and truncation, which are not used.
    """
    tokenizer = encoder.tokenizer
    whole = directory / "tokenizer.json"
    names = ("tokenizer.model", "vocab.json", "merges.txt")
    files = [whole] if whole.is_file() else [directory / name for name in names if (directory / name).is_file()]

    def content() -> str:
        if files != [whole]:
            return digest([file_digest(file) for file in files])
        values = json.loads(whole.read_bytes())
        return digest({key: value for key, value in values.items() if key not in ("padding", "truncation")})

    added = {
        number: (str(token.content), token.lstrip, token.rstrip, token.single_word, token.normalized, token.special)
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return digest([kept("tokenizers", files, stamp(files), content), added, special, encoder.pad_id, probe])


def _config_json(directory: Path) -> dict[str, Any]:
    return read_object(directory / "config.json", "take config.json from the model's own repository")


def settings(config: Config) -> dict[str, Any]:
    """Of a config, what changes a run's result, by section, as JSON gives it back."""
    sections = json.loads(json.dumps(dataclasses.asdict(config)))
    return {
        section: {name: fields[name] for name in fields_that("result", getattr(config, section))}
        for section, fields in sections.items()
    }


def _check_template(run: epath.Path, written: str, inputs: Inputs) -> None:
    path, now = run / TEMPLATE, _sha256(unguarded(inputs.encoder.template))
    if path.exists() and _written(path) != written:
        remedy = f"delete it: {inputs.directory} still has it" if now == written else "restore it from a copy"
        raise UserError(f"{path}: is not the chat template that the run was trained with; {remedy}")
    if now != written:
        named = inputs.config.data.chat_template
        place = inputs.directory / TEMPLATE if named == "auto" else named
        raise UserError(
            f"{place}: the chat template changed since {run} was trained; put back the one it was trained with, "
            f"which {path} holds"
        )


def _written(path: epath.Path) -> str:
    """Digest of a template less the part that guards text, which is the version's and not the run's."""
    return _sha256(unguarded(path.read_bytes().decode("utf-8", "surrogateescape")))


def _check_settings(run: epath.Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Says what was edited in config.json, and refuses it where the checkpoint depends on it."""
    for section, fields in begun.items():
        edited = {key: now[section][key] for key in fields if key in now.get(section, {})}
        edited = {key: value for key, value in edited.items() if value != fields[key]}
        for key, value in edited.items():
            said = f"{run / 'config.json'}: {section}.{key} is {value!r}, was {fields[key]!r} when the run was begun"
            if section in _BINDING:
                raise UserError(f"{said}; its checkpoints are of no use with another: restore it")
            _say(said)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return "; ".join(f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr)
