"""The files of a prefix table: written whole, found damaged, kept for readers, removed."""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from e2p_jax.errors import UserError
from e2p_jax.export.common import save_tokenizer
from e2p_jax.export.engines import SERVING_TEMPLATE
from e2p_jax.export.prefix_reader import (
    MANIFEST,
    CheckedRows,
    DamagedManifest,
    checksums,
    directory_name,
    ids_name,
    manifest_checksum,
    read_manifest,
)
from e2p_jax.files import write_bytes, write_text
from e2p_jax.train.run import Run
from e2p_jax.vectors.index import UserIndex
from e2p_jax.vectors.table import UserTable

_BLOCK = 1 << 16  # user ids written at once
_NAMED = re.compile(r"[0-9a-f]{32}\.(safetensors|ids\.txt|index\.npy|tokens\.safetensors|tokenizer)")
_TEMPORARY = re.compile(  # what a killed run leaves
    r"\.(ids|tokenizer|manifest\.json|chat_template\.jinja|[0-9a-f]{32}\.((tokens\.)?safetensors|index\.npy))\.tmp"
)


def open_out(out: Path, fingerprint: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest that is there, if one is whole, and the name of one that is damaged. Nothing is written."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: is a file; choose a new directory")
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another directory") from error
    before, mended = None, []
    ours = [name for name in names if _NAMED.fullmatch(name) or _TEMPORARY.fullmatch(name)]
    if MANIFEST in names:
        try:
            before = read_manifest(out / MANIFEST)
        except DamagedManifest:
            mended = [MANIFEST]
    if before or ours:  # else they are somebody else's
        ours += [MANIFEST, SERVING_TEMPLATE]
    if foreign := [name for name in names if name not in ours]:
        raise UserError(f"--out {out}: holds other files ({', '.join(foreign[:3])}); choose a new directory")
    if before and before["backbone"]["fingerprint"] != fingerprint:
        there = before["backbone"]["fingerprint"][:12]
        raise UserError(f"--out {out}: holds the table of another backbone ({there}); choose a new directory")
    return before, mended


def write_ids(table: UserTable, out: Path, mended: list[str]) -> str:
    """Writes the user ids and their index, unless they are there and whole, and returns their name.

    Args:
      mended: the names of files that were damaged are added to it.

    Raises:
      UserError: naming a user whose id does not fit on a line.
    """
    temporary = out / ".ids.tmp"
    try:
        _write_lines(table, temporary)
        name = ids_name(temporary)
        path, index = out / f"{name}.ids.txt", out / f"{name}.index.npy"
        before = index.stat().st_ino if index.exists() else None
        found = UserIndex.open(temporary, index)
        if not isinstance(found.words, np.memmap):  # made anew
            if not index.exists() or index.stat().st_ino == before:
                found.save(index)  # to know why `open` could not
            if before is not None:
                mended.append(index.name)
        if not path.exists():
            os.replace(temporary, path)
        elif ids_name(path) != name:
            mended.append(path.name)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return name


def _write_lines(table: UserTable, path: Path) -> None:
    with path.open("wb") as file:
        for first in range(0, len(table.ids), _BLOCK):
            rows = table.ids.rows(slice(first, first + _BLOCK))
            lines = table.index.lines(rows) + b"\n"
            if lines.count(b"\n") > len(rows) or b"\r\n" in lines:
                broken = (u for u in table.index.ids(rows) if "\n" in u or u.endswith("\r"))
                raise UserError(f"{table.source}: user id {next(broken)!r} holds a line break; rename that user")
            file.write(lines)


def write_tokens(out: Path, embeddings: np.ndarray, mended: list[str]) -> str:
    """Writes the token embeddings [V, D], unless they are there and whole, and returns their name."""
    embeddings = np.ascontiguousarray(embeddings)
    digest = hashlib.sha256(f"{embeddings.dtype} {embeddings.shape}\n".encode())
    digest.update(embeddings.view(np.uint8).data)
    name = digest.hexdigest()[:32]
    path = out / f"{name}.tokens.safetensors"
    if not intact(path, "embeddings", embeddings.shape, embeddings.dtype.name):
        if path.exists():
            mended.append(path.name)
        save_rows(path, "embeddings", embeddings)
    return name


def write_tokenizer(run: Run, out: Path, mended: list[str]) -> str:
    """Writes the run's tokenizer, unless it is there and whole, and returns its name."""
    temporary = out / ".tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_tokenizer(run, temporary)
        name = directory_name(temporary)
        path = out / f"{name}.tokenizer"
        if path.exists() and directory_name(path) != name:
            mended.append(path.name)
            shutil.rmtree(path)
        if not path.exists():
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def intact(path: Path, tensor: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Tells whether a run before this one wrote the file, and it is as it was written."""
    try:
        held = CheckedRows(path, tensor)
        held.verify()
    except UserError:
        return False
    return held.rows.shape == shape and held.rows.dtype.name == dtype


def save_rows(path: Path, tensor: str, rows: np.ndarray) -> None:
    rows = np.ascontiguousarray(rows)
    sums = checksums(rows, path, np.arange(len(rows))).view(np.int64)
    write_bytes(path, save({tensor: rows, "checksums": sums}))


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """From here on readers open what it names."""
    write_text(out / MANIFEST, json.dumps(manifest | {"checksum": manifest_checksum(manifest)}, indent=2) + "\n")


def swap(out: Path, before: dict[str, Any] | None, manifest: dict[str, Any], keep_hours: float) -> None:
    """Puts the manifest into its place, and removes what left the table `keep_hours` ago or a killed run left."""
    unnamed = [p for p in out.iterdir() if _NAMED.fullmatch(p.name) and p.name not in files_of(manifest)]
    for path in unnamed:
        if before is None or path.name in files_of(before) or path.stat().st_mtime > time.time():
            os.utime(path)  # when it left the table; after the clock went back, no earlier than now
    write_manifest(out, manifest)
    for path in unnamed:
        if path.stat().st_mtime <= time.time() - 3600 * keep_hours:
            _remove(path)
    for path in out.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def files_of(manifest: dict[str, Any] | None) -> set[str]:
    """The files that a manifest names."""
    if manifest is None:
        return set()
    ids, shards = manifest["ids"], manifest["shards"]
    rest = {f"{ids}.ids.txt", f"{ids}.index.npy", f"{manifest['tokens']}.tokens.safetensors"}
    return rest | {f"{manifest['tokenizer']}.tokenizer"} | {f"{shard['name']}.safetensors" for shard in shards}
