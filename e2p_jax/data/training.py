"""Reads what a run needs before it trains: the training records as tokens, and the records of its evaluation.

Tokens are kept in `data.cache`, one directory for each different way that data can become tokens: its name is a digest
of the data's bytes, the tokenizer, the template and every setting that has a say. A directory appears whole or not at
all, and holds the checksums of its files: what does not agree with them is made anew.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import e2p_jax
from e2p_jax.config import Config, DataConfig
from e2p_jax.data.columns import Ragged
from e2p_jax.data.conditions import spelled_out
from e2p_jax.data.encode import Encoder, Example
from e2p_jax.data.examples import Examples, map_column
from e2p_jax.data.packing import Budget, choose_budget, plan_rows
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.prepared import load_splits, load_training
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.files import explain_full_disk, replace_directory, user_cache
from e2p_jax.json_files import digest, object_in
from e2p_jax.parallel.distributed import is_first

_LAYOUT = 7  # of a cache directory
_META = "meta.json"


@dataclasses.dataclass(frozen=True)
class Training:
    """The records of a run."""

    examples: Examples  # of the training records, under `data.condition`; on disk
    budget: Budget
    rows: Ragged  # the plan: which examples share a row; on disk once it is cached
    dev: list[Record]
    reported: dict[str, list[Record]]  # by split
    dropped_messages: int
    skipped: str | None  # what was skipped as bad, if anything was


def read_training(config: Config, encoder: Encoder) -> Training:
    """Reads and tokenises what the config names, or takes it from the cache.

    Raises:
      UserError: naming the record or split at fault, or a cache that cannot be written.
    """
    folder = cache_directory(config.data.cache)
    if folder is None:
        return _read(config, encoder, Path(tempfile.gettempdir()))
    place = folder / _key(config, encoder)
    try:
        return _load(place)
    except FileNotFoundError as error:
        fault = "a file is missing" if error.filename != str(place / _META) else ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = str(error) if isinstance(error, ValueError) else "damaged"
    if fault and is_first():
        print(f"data.cache: {place} is made anew ({fault})", file=sys.stderr)
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    training = _read(config, encoder, folder)
    if _key(config, encoder) == place.name:  # else it was written to meanwhile: which of the two was read?
        with _explained(folder):
            _save(training, place)
    return training


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as error:  # the latter from `replace_directory`, in words that know no `none`
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise UserError(
            f"data.cache: {folder} cannot be written ({reason}); name another directory, or none"
        ) from error


def cache_directory(setting: str) -> Path | None:
    """Gives the place of `data.cache`, if any."""
    if setting == "none":
        return None
    if setting == "auto":
        return user_cache() / "tokens"
    return Path(setting).expanduser()


def _read(config: Config, encoder: Encoder, directory: Path) -> Training:
    """Holds the training split in files without a name in `directory`."""
    condition = config.data.condition
    bad = BadRecords(config.data.on_bad_record, config.data.max_bad_share, "--data.on_bad_record")
    reported = load_splits(config.data.path, config.data.eval_splits, bad)
    learned, dev = load_training(config.data, reported, bad)
    dropped = 0

    def fitted() -> Iterator[Example]:
        nonlocal dropped
        for record in spelled_out(learned, condition):
            fit = encoder.fit(record, [condition])
            dropped += fit.dropped_messages
            yield fit.examples[condition]

    with explain_full_disk(directory):
        examples = Examples.of(fitted(), directory)
    budget = choose_budget(examples, encoder.max_length)
    return Training(examples, budget, plan_rows(examples, budget), dev, reported, dropped, bad.report())


def _key(config: Config, encoder: Encoder) -> str:
    """Names everything that the tokens depend on; that a setting has no say must be written here to be left out."""
    without = {"embeddings", "items", "missing_user", "cache", "chat_template"}  # the template itself is in
    data = {name: value for name, value in dataclasses.asdict(config.data).items() if name not in without}
    tokenizer = encoder.tokenizer
    settings = {
        "layout": 2,  # of this key; that of the files is in `meta.json`, so that an old one is found
        "version": e2p_jax.__version__,
        "data": data,
        "content": fingerprint(config.data),
        "prefix": dataclasses.asdict(config.prefix),
        "num_tokens": encoder.num_tokens,
        "template": encoder.template,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "pad": encoder.pad_id,
        "item_token": encoder.item_token,
        "items": encoder.catalogue and hashlib.sha256(encoder.catalogue.table.index.text.data).hexdigest(),
    }
    return digest(settings)[:32]


def fingerprint(data: DataConfig) -> str:
    """SHA-256 over the bytes of the data, and over the names of its files where it is a directory."""
    place = Path(data.path).expanduser()
    if data.path == "synthetic":
        place = Path(synthetic.__file__)
    if place.is_file():
        return _digest(place)
    content = hashlib.sha256()
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        content.update(f"{path.relative_to(place)} {_digest(path)}\n".encode())
    return content.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(training: Training, place: Path) -> None:
    """Whole or not at all."""
    shutil.rmtree(place, ignore_errors=True)  # a damaged one
    with replace_directory(place) as temporary:
        training.examples.save(temporary)
        np.save(temporary / "rows.npy", training.rows.values)
        np.save(temporary / "row_ends.npy", training.rows.ends)
        texts = {
            "dev": list(map(dataclasses.asdict, training.dev)),
            "reported": {name: list(map(dataclasses.asdict, held)) for name, held in training.reported.items()},
            "budget": list(map(int, training.budget)),
            "dropped_messages": training.dropped_messages,
            "skipped": training.skipped,
        }
        (temporary / "records.json").write_text(json.dumps(texts), encoding="utf-8")
        meta = {"layout": _LAYOUT, "files": {path.name: _digest(path) for path in sorted(temporary.iterdir())}}
        (temporary / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _load(place: Path) -> Training:
    """
    Raises:
      OSError, ValueError, KeyError, TypeError: it is not there, or not as it was written.
    """
    meta = object_in((place / _META).read_bytes())
    if meta.get("layout") != _LAYOUT:
        raise ValueError("it has the layout of another version")
    if meta["files"] != {path.name: _digest(path) for path in place.iterdir() if path.name != _META}:
        raise ValueError("its files are not those that were written")
    texts = json.loads((place / "records.json").read_text(encoding="utf-8"))
    return Training(
        Examples.load(place),
        Budget(*texts["budget"]),
        Ragged(map_column(place, "rows"), map_column(place, "row_ends")),
        list(map(_record, texts["dev"])),
        {name: list(map(_record, held)) for name, held in texts["reported"].items()},
        texts["dropped_messages"],
        texts["skipped"],
    )


def _record(values: dict[str, Any]) -> Record:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Record(**fields)
