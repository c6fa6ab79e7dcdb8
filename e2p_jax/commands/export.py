"""`e2p export`, `e2p prefixes`, `e2p import` and `e2p convert`."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from e2p_jax.commands.common import DETECTED, Checkpoint, Embeddings, Run, Together
from e2p_jax.errors import UserError
from e2p_jax.registry import EXPORTS, one_of
from e2p_jax.terminal import say

_NEEDED = {"out": "--out DIR", "users": "--user", "prompt": "--prompt"}  # by formats that take them


def export(
    run: Run,
    /,
    out: Path | None = None,
    format: Annotated[str, one_of(EXPORTS)] = "transformers",
    include_backbone: bool = False,
    user: tuple[str, ...] = (),
    prompt: str | None = None,
    embeddings: str | None = None,
    model: str | None = None,
    cache_salt: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    checkpoint: Checkpoint = "best",
) -> None:
    """Writes what a run trained in another program's form.

    Args:
      out: Directory to write; with vllm, vllm-chat and sglang a file. Default for those: stdout.
      format: One of `registry.EXPORTS`.
      include_backbone: With transformers: copy the backbone's tensors too; else they are named and
        fingerprinted, but for the embedded backbone, which always comes along.
      user: With peft and the engines: user ids, or @vector.npy (@@alice is the user @alice).
      prompt: With the engines: the user turn to answer.
      embeddings: With peft and the engines: table of user vectors to use in place of the run's.
      model: With vllm and vllm-chat: the name that the engine serves. Default: the backbone's own.
      cache_salt: With vllm and vllm-chat: keep users apart in the engine's prefix cache by a field of the body.
      dtype: With backbone: of the written tensors.
    """
    from e2p_jax.files import explain_refusal, write_text
    from e2p_jax.train.run import open_run

    chosen = EXPORTS[format]
    given: dict[str, Any] = {"out": out, "users": user, "prompt": prompt}
    given |= {"model": model, "cache_salt": cache_salt}
    given |= {"format": format, "include_backbone": include_backbone, "dtype": dtype}
    flags = chosen.of(given)
    if any(flags.get(name, True) in (None, ()) for name in _NEEDED):
        needed = " and ".join(text for name, text in _NEEDED.items() if name in flags)
        raise UserError(f"--format {format}: give {needed}")
    opened = open_run(run, checkpoint, embeddings, backbone=chosen.backbone)
    if not chosen.items:
        _say_lost(opened)
    made = chosen.load()(opened, **flags)
    if "out" not in flags:
        lines = "".join(json.dumps(value) + "\n" for value in made)
        if out is None:
            print(lines, end="")
            return
        with explain_refusal(out):
            write_text(out, lines)
    print(out)


def _say_lost(run: Any) -> None:
    if run.inputs.catalogue is not None:
        token = " and the item that stands in front of replies" if run.inputs.config.items.token else ""
        say(f"warning: what is written lacks the head over items{token}; `e2p export --format transformers` has it")


def prefixes(
    run: Run,
    /,
    out: Path,
    embeddings: Embeddings = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    checkpoint: Checkpoint = "best",
    keep_hours: float = 24.0,
    parquet: Path | None = None,
    processes: Together = DETECTED,
) -> None:
    """Projects every user of a table once, to be looked up when serving; rerun it to resume, to update, or to mend.

    Args:
      out: Directory to write, or to update; with several processes, on storage that all share.
      dtype: Of the soft tokens.
      keep_hours: How long at least a version stays that an update takes out: to be put back by `e2p rollback`, and for
        readers on hosts whose locks are not seen here. What a reader on this host holds stays anyway.
      parquet: File to write the table to as well, one row a user: id, version, prefix.
    """
    from e2p_jax.export.prefix_table import export_prefixes
    from e2p_jax.parallel.distributed import is_first, session
    from e2p_jax.train.run import open_run

    with session(processes):
        opened = open_run(run, checkpoint, embeddings, backbone="embedding")
        written = export_prefixes(opened, out, dtype, keep_hours)
        if is_first():
            say(written.text())
            _say_lost(opened)
            if parquet is not None:
                from e2p_jax.export.parquet import write_parquet
                from e2p_jax.export.prefix_reader import PrefixTable

                write_parquet(PrefixTable(out), parquet)
            print(out)


def rollback(table: tyro.conf.Positional[Path], /, version: str | None = None) -> None:
    """Puts the version of a prefix table back that was there before the last update; again, and it is undone.

    Args:
      table: Directory that `e2p prefixes` wrote.
      version: One of those that are kept. Default: the one that was there last.
    """
    from e2p_jax.export.prefix_files import roll_back

    print(roll_back(table, version))


def import_run(
    directory: tyro.conf.Positional[Path], /, out: Path, data: str | None = None, embeddings: str | None = None
) -> None:
    """Makes a run of an exported transformers directory, to evaluate it or to train it on.

    Args:
      directory: What `e2p export --format transformers` wrote.
      out: Run directory to make; its config.json may be edited before training goes on.
      data: Records to train on: as `data.path` of a config. Default: what the export names, if it is found from here.
      embeddings: Table of user vectors. Default: what the export names, if it is found from here.
    """
    from e2p_jax.export.import_back import import_transformers

    config = import_transformers(directory, out, data, embeddings)
    if config.data.embeddings is None:
        say("no table of user vectors is named or found from here; to train on, import again with --embeddings TABLE")
    say(f"train on with: e2p train {out / 'config.json'} --workdir {out}")
    print(out)


def convert(
    model: tyro.conf.Positional[str],
    /,
    out: Path,
    revision: str | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    ignored_keys: tuple[str, ...] = (),
) -> None:
    """Writes a Hugging Face model as a Flax (Orbax) checkpoint, or such a checkpoint as a Hugging Face model again.

    The tensors keep their bytes and dtypes, and both forms have one fingerprint: either serves as backbone.path. A GGUF
    file and a quantised model are dequantised, and written as a plain Hugging Face model.

    Args:
      model: What backbone.path takes: a directory in any form, a GGUF file, a hub id, or `embedded`.
      out: Directory to write.
      revision: Branch, tag or commit, when the model is a hub id.
      dtype: Of what is dequantised.
      ignored_keys: Unknown keys of config.json that change nothing, as backbone.ignored_keys; a Flax checkpoint keeps
        them.
    """
    from e2p_jax.backbone import convert as conversion
    from e2p_jax.backbone.families import say_ignored
    from e2p_jax.backbone.weights import resolve

    directory = resolve(model, revision)
    name = str(directory.resolve()) if Path(model).expanduser().is_dir() else model
    conversion.convert(directory, out, name, revision, dtype, ignored_keys)
    for line in say_ignored(directory, ignored_keys):
        say(f"warning: {line}")
    print(out)
