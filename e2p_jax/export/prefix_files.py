"""The files of a prefix table: written whole, found damaged, kept for readers, put back, removed."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save

from e2p_jax.errors import UserError
from e2p_jax.export.prefix_reader import (
    MANIFEST,
    SERVING_TEMPLATE,
    CheckedRows,
    DamagedManifest,
    checksums,
    directory_name,
    ids_name,
    manifest_checksum,
    read_manifest,
)
from e2p_jax.files import write_bytes, write_text
from e2p_jax.vectors.index import UserIndex

if TYPE_CHECKING:
    from e2p_jax.train.run import Run
    from e2p_jax.vectors.table import UserTable

_BLOCK = 1 << 16  # user ids written at once
_KEPT = re.compile(r"[0-9a-f]{16}\.manifest\.json")
_NAMED = re.compile(r"[0-9a-f]{32}\.(((tokens|projector)\.)?safetensors|ids\.txt|index\.npy|tokenizer)")
_TEMPORARY = re.compile(  # what a killed run leaves
    r"\.(ids|tokenizer|manifest\.json|chat_template\.jinja"
    r"|[0-9a-f]{32}\.(((tokens|projector)\.)?safetensors|index\.npy))\.tmp"
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
    ours = [name for name in names if any(kind.fullmatch(name) for kind in (_NAMED, _KEPT, _TEMPORARY))]
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


def write_ids(table: "UserTable", out: Path, mended: list[str]) -> str:
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


def _write_lines(table: "UserTable", path: Path) -> None:
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


def write_projector(out: Path, tensors: dict[str, np.ndarray], mended: list[str]) -> str:
    """Writes the projector's parameters, unless they are there and whole, and returns their name."""
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in sorted(tensors.items())})
    name = hashlib.sha256(data).hexdigest()[:32]
    path = out / f"{name}.projector.safetensors"
    if not path.exists() or path.read_bytes() != data:
        if path.exists():
            mended.append(path.name)
        write_bytes(path, data)
    return name


def write_tokenizer(run: "Run", out: Path, mended: list[str]) -> str:
    """Writes the run's tokenizer, unless it is there and whole, and returns its name."""
    from e2p_jax.export.common import save_tokenizer

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
    """Puts the manifest into its place, and removes what left the table `keep_hours` ago or a killed run left.

    The manifest that was there stays as `<its checksum>.manifest.json` as long as the files that it names, and these as
    long as it: `keep_hours`, and while a reader holds it.
    """
    _replace_manifest(out, before, manifest)
    oldest = time.time() - 3600 * keep_hours
    paths = sorted(out.iterdir())
    for path in paths:
        if path.stat().st_mtime > time.time():  # the clock went back
            os.utime(path)
    for path in paths:
        if _KEPT.fullmatch(path.name) and path.stat().st_mtime <= oldest:
            with path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # a reader holds it
                    continue
                except OSError:  # storage without locks: `keep_hours` is all there is
                    pass
                path.unlink()
    named = files_of(manifest).union(*(files_of(kept) for kept in versions(out).values()))
    for path in paths:
        left = _NAMED.fullmatch(path.name) and path.name not in named and path.stat().st_mtime <= oldest
        if left or _TEMPORARY.fullmatch(path.name):
            _remove(path)


def roll_back(out: Path, version: str | None = None) -> str:
    """Puts an earlier version of a table back into its place, and returns its name; what was there is kept as one.

    Args:
      version: one of `versions`; by default the one that was there last.

    Raises:
      UserError: no such version, a damaged one, or files that it names are gone.
    """
    before = None
    with contextlib.suppress(DamagedManifest):
        before = read_manifest(out / MANIFEST)
    kept = {name: manifest for name, manifest in versions(out).items() if manifest != before}
    chosen = version or next(reversed(kept), "")
    if chosen not in kept:
        there = ", ".join(reversed(kept)) or "none: there was no update, or --keep-hours has passed"
        raise UserError(f"{out}: no earlier version {version or ''}".rstrip() + f"; kept: {there}")
    if missing := sorted(files_of(kept[chosen]) - {path.name for path in out.iterdir()}):
        raise UserError(f"{out}: of version {chosen} {missing[0]} is gone; rerun `e2p prefixes`")
    _replace_manifest(out, before, kept[chosen])
    return chosen


def versions(out: Path) -> dict[str, dict[str, Any]]:
    """The manifests of earlier versions that are whole, by name, in the order in which they left."""
    paths = [path for path in out.iterdir() if _KEPT.fullmatch(path.name)]
    found = {}
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(DamagedManifest):
            found[path.name.partition(".")[0]] = read_manifest(path)
    return found


def _replace_manifest(out: Path, before: dict[str, Any] | None, manifest: dict[str, Any]) -> None:
    place, name = out / MANIFEST, manifest_checksum(manifest)
    if before is not None and manifest_checksum(before) == name:
        return
    if before is None:
        for path in out.iterdir():
            if path.name not in files_of(manifest):
                os.utime(path)  # nobody knows what readers have open
    else:
        kept = out / f"{manifest_checksum(before)}.manifest.json"
        with contextlib.suppress(FileExistsError):
            try:
                os.link(place, kept)  # it keeps the locks of its readers
            except OSError:  # storage without links
                write_bytes(kept, place.read_bytes())
        os.utime(kept)  # when it left
    earlier = out / f"{name}.manifest.json"
    if name in versions(out):
        os.replace(earlier, place)
    else:
        earlier.unlink(missing_ok=True)
        write_manifest(out, manifest)


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
    if "parameters" in manifest:  # not in tables of before
        rest |= {f"{manifest['parameters']}.projector.safetensors"}
    return rest | {f"{manifest['tokenizer']}.tokenizer"} | {f"{shard['name']}.safetensors" for shard in shards}
