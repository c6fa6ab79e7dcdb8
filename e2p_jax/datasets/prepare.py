"""Original files -> a prepared dataset: TFDS, array_record."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.errors import UserError
from e2p_jax.files import file_digest
from e2p_jax.locks import locked
from e2p_jax.registry import DATASETS
from e2p_jax.terminal import say

if TYPE_CHECKING:
    from e2p_jax.datasets.builder import RecordBuilder, RecordConfig


def prepare(
    dataset: str, manual_dir: Path, data_dir: Path, options: Sequence[str] = (), bad: BadRecords | None = None
) -> Path:
    """Writes a dataset under `data_dir`, unless it is there already. It appears whole or not at all.

    Args:
      dataset: One of `registry.DATASETS`, or one of its configurations: `persona_chat/self_revised`.
      manual_dir: Where the original files lie.
      data_dir: Where prepared datasets go.
      options: `name=value` each: what to change in the configuration's options.
      bad: The policy for malformed records; the first one is an error by default. A directory that is there already
        must have been prepared as this policy allows.

    Returns:
      The directory that `load_records` reads.

    Raises:
      UserError: an unknown dataset or option, a missing or malformed original file, or a directory prepared from other
        files or without records that may not be skipped.
    """
    name, _, config = dataset.partition("/")
    if name not in DATASETS:
        raise UserError(f"dataset {dataset!r}: unknown; there are {', '.join(DATASETS)}")
    bad = bad or BadRecords()
    manual_dir, data_dir = manual_dir.expanduser(), data_dir.expanduser()
    if not manual_dir.is_dir():
        raise UserError(f"--manual-dir {manual_dir}: not a directory; it must hold the dataset's original files")
    builder_class = DATASETS[name].load()
    builder = builder_class(config=_configuration(builder_class, name, config, options), data_dir=data_dir, bad=bad)
    directory = Path(builder.data_dir)
    sources = {path.name: file_digest(path) for path in builder.sources(manual_dir)}
    if not directory.exists():
        with locked(directory.parent / ".lock"):
            if not directory.exists():  # else another command has just written it
                for unfinished in directory.parent.glob(f"incomplete.*_{directory.name}"):  # by one that was killed
                    shutil.rmtree(unfinished)
                _write(builder, manual_dir, sources)
                return directory
        builder = builder_class(config=builder.builder_config, data_dir=data_dir)
    before = builder.info.metadata.get("sources", {})
    if changed := sorted(file for file in before | sources if before.get(file) != sources.get(file)):
        raise UserError(
            f"{directory}: not prepared from what --manual-dir holds now ({', '.join(changed)}); "
            "delete it to prepare it anew, or give another --data-dir"
        )
    bad.check(builder.info.metadata.get("bad_records", {}), directory)
    return directory


def _write(builder: "RecordBuilder", manual_dir: Path, sources: dict[str, str]) -> None:
    import tensorflow_datasets as tfds

    builder.info.metadata.update(sources=sources, bad_records=builder.bad.files)  # the latter fills as files are read
    download_config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    with contextlib.redirect_stdout(sys.stderr):  # TFDS tells its progress on stdout, which is for results
        builder.download_and_prepare(download_config=download_config, file_format="array_record")
        for line in _report(builder):
            say(line)


def _configuration(
    builder: "type[RecordBuilder]", dataset: str, name: str, options: Sequence[str]
) -> "RecordConfig | None":
    """The named configuration; with options it has a name of its own, which tells them apart.

    Raises:
      UserError: no such configuration, option or value.
    """
    known: Any = builder.builder_configs
    if name not in known and (name or options):
        offered = ", ".join(f"{dataset}/{other}" for other in known) or "none"
        if name or not known:
            raise UserError(f"dataset {dataset}: no configuration {name!r}; there are: {offered}")
    if not known:
        return None
    config = known[name] if name else builder.BUILDER_CONFIGS[0]
    changes = _parse_options(config, [other.options for other in known.values()], dataset, options)
    if not changes:
        return config
    changed = dataclasses.replace(config.options, **changes)
    changed.validate()
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
    return dataclasses.replace(config, name=f"{config.name}-{digest}", options=changed)


def _parse_options(config: Any, every: Sequence[Any], dataset: str, options: Sequence[str]) -> dict[str, Any]:
    """Name -> value, of the option's type, where it is not what the configuration has anyway."""
    kinds = typing.get_type_hints(type(config.options)) if config.options is not None else {}
    named = {option for option in kinds if len({getattr(each, option) for each in every}) > 1}
    changes = {}
    for text in options:
        option, equals, given = text.partition("=")
        if not equals or option not in kinds or option in named:
            settable = ", ".join(sorted(kinds.keys() - named)) or "no options"
            raise UserError(f"--set {text}: give name=value; {dataset}/{config.name} has {settable}")
        choices = typing.get_args(kinds[option])
        try:
            value: Any = given if choices else kinds[option](given)
        except ValueError as error:
            raise UserError(f"--set {text}: {option} must be of type {kinds[option].__name__}") from error
        if choices and given not in choices:
            raise UserError(f"--set {text}: choose from {', '.join(choices)}")
        if value != getattr(config.options, option):
            changes[option] = value
    return changes


def _report(builder: "RecordBuilder") -> list[str]:
    """Says what was written, left out and skipped."""
    sizes = ", ".join(f"{split.num_examples} {name}" for name, split in builder.info.splits.items())
    left_out = [f"left out {count} {what}" for what, count in builder.left_out.items() if count]
    skipped = builder.bad.report()
    return [f"records: {sizes}", *left_out, *builder.notes, *([skipped] if skipped else [])]
