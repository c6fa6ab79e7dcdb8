"""Looks up users' soft tokens in a table that `e2p prefixes` wrote. Imports neither jax, torch nor transformers."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import resource
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from e2p_jax.errors import UserError
from e2p_jax.files import file_digest
from e2p_jax.tensors import read_tensors
from e2p_jax.vectors.index import UserIndex

MANIFEST = "manifest.json"
SERVING_TEMPLATE = "chat_template.jinja"  # for vLLM's chat endpoint
REMEDY = "rerun `e2p prefixes` to mend it; if the table was updated since it was opened, open it anew"
_WORD = (1 << 64) - 1


class PrefixTable:
    """User id -> soft tokens. Rows, ids and their index stay on disk, memory-mapped; what all users share is read once.

    Manifest, ids, index and what is shared are verified when the table is opened, a user's own soft tokens whenever
    they are looked up. An update of the table swaps its manifest: a reader keeps the version that it opened, whose
    files stay as long as it is there, and `reload` gives the new one. Threads may share a reader.
    """

    def __init__(self, directory: Path, fingerprint: str | None = None):
        """
        Args:
          directory: what `e2p prefixes` wrote.
          fingerprint: of the backbone that will read the soft tokens, to be held against the table's
            (`backbone.json` of a run, `config.json` of an export).

        Raises:
          UserError: unfinished, damaged, of an earlier version, or made for another backbone.
        """
        self.directory, self._fingerprint = directory, fingerprint
        while True:
            self._held = _hold(directory / MANIFEST)
            weakref.finalize(self, self._held.close)
            try:
                self._open()
                return
            except UserError:
                if self._is_newest():
                    raise  # else an update came between

    def _open(self) -> None:
        directory, fingerprint = self.directory, self._fingerprint
        self.manifest = parse_manifest(directory / MANIFEST, self._held.read())
        self.version = manifest_checksum(self.manifest)
        there = self.manifest["backbone"]["fingerprint"]
        if fingerprint is not None and fingerprint != there:
            raise UserError(
                f"{directory}: made for a backbone with fingerprint {there[:12]}, not {fingerprint[:12]}; "
                "serve that backbone, or project the users again with a run of yours"
            )
        self.shape = (int(self.manifest["num_tokens"]), int(self.manifest["width"]))  # K, D
        self._own = int(self.manifest.get("own_tokens", self.shape[0]))  # once the shared ones were every user's
        self._index = self._open_ids(self.manifest["ids"])
        shards, shape = self.manifest["shards"], (self._own, self.shape[1])
        open_shard = functools.partial(_open_shard, directory, shards, shape, self.manifest["dtype"])
        self._shard = functools.lru_cache(_most_mapped())(open_shard)
        self._users_a_shard, self._dtype = shards[0]["users"], self._shard(0).rows.dtype  # of all but the last
        for number in range(len(shards)):  # missing or truncated: known now
            self._shard(number)
        sizes = [shard["users"] for shard in shards]
        if sum(sizes) != self._index.rows or set(sizes[:-1]) - {sizes[0]} or sizes[-1] > sizes[0]:
            raise UserError(f"{directory}: {self._index.rows} ids for shards of {sizes[:3]} users and more; {REMEDY}")
        shared = self._own < self.shape[0]  # [S, D], behind every user's own
        self._common = np.array(self._projector["common"]) if shared else np.zeros((0, self.shape[1]), self._dtype)

    def _open_ids(self, name: str) -> UserIndex:
        path = self.directory / f"{name}.ids.txt"
        if not path.is_file() or ids_name(path) != name:
            raise UserError(f"{path}: missing or damaged; {REMEDY}")
        return UserIndex.open(path, self.directory / f"{name}.index.npy")

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, user: str) -> bool:
        return bool(self._index.find([user])[0] >= 0)

    def lookup(self, users: Sequence[str]) -> np.ndarray:
        """[N, K, D] in the table's dtype.

        Raises:
          AbsentUser: naming the user.
          UserError: naming the damaged file in which the user's soft tokens are.
        """
        out, found = self.get_many(users)
        if not found.all():
            user = users[int(np.argmin(found))]
            raise AbsentUser(f"{self.directory}: user {user!r} has no prefix; add the vector, rerun `e2p prefixes`")
        return out

    def get_many(self, users: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same for users of whom some may be absent, and [N] bool: who is there. Others have `null`, else zeros.

        Raises:
          UserError: naming the damaged file in which a user's soft tokens are.
        """
        rows = self._index.find(users)
        out, found = np.zeros((len(users), *self.shape), self._dtype), rows >= 0
        if not found.all() and self.null is not None:
            out[~found] = self.null
        shards, places = np.divmod(rows, self._users_a_shard)
        out[found, self._own :] = self._common
        for number in set(shards[found].tolist()):
            here = shards == number
            try:
                out[here, : self._own] = self._shard(number).read(places[here])
            except UserError:
                self._shard.cache_clear()  # it may be mended meanwhile
                out[here, : self._own] = self._shard(number).read(places[here])
        return out, found

    def shards(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """All users, some at a time: n ids and their soft tokens, [n, K, D].

        Raises:
          UserError: naming the damaged file.
        """
        twice = self._index.repeats()
        for number, shard in enumerate(self.manifest["shards"]):
            places = np.arange(shard["users"])
            places = places[~np.isin(places + number * self._users_a_shard, twice)]
            own = self._shard(number).read(places)
            common = np.broadcast_to(self._common, (len(own), *self._common.shape))
            yield self._index.ids(places + number * self._users_a_shard), np.concatenate([own, common], axis=1)

    @functools.cached_property
    def null(self) -> np.ndarray | None:
        """[K, D] in the table's dtype: of a user without a vector, where the run has a null user.

        Raises:
          UserError: the file is missing or damaged.
        """
        return self._projector.get("null")

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """[N, K, D] in the table's dtype: the soft tokens of users seen just now, as `e2p prefixes` would make them.

        Args:
          vectors: [N, E] float32, as they would stand in the table of user vectors.

        Raises:
          UserError: as `numpy_projector.project`, or the file of parameters is missing or damaged.
        """
        from e2p_jax.prefix.numpy_projector import project

        return project(self.manifest["config"]["projector"], self._projector, vectors, self._dtype)

    @functools.cached_property
    def _projector(self) -> dict[str, np.ndarray]:
        if not (name := self.manifest.get("parameters")):
            return {}
        path = self.directory / f"{name}.projector.safetensors"
        if not path.is_file() or file_digest(path)[:32] != name:
            raise UserError(f"{path}: missing or damaged; {REMEDY}")
        return read_tensors(path, REMEDY)

    def reload(self) -> "PrefixTable":
        """The version that is there now: a new reader, or this one where nothing has changed.

        Raises:
          UserError: as when a table is opened. This reader serves on.
        """
        return self if self._is_newest() else PrefixTable(self.directory, self._fingerprint)

    def _is_newest(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._held.fileno()), (self.directory / MANIFEST).stat())
        return True


class AbsentUser(UserError):
    """A user who is not in the table."""


class Damaged(UserError):
    """A file of a table that is not what was written."""


class DamagedManifest(Damaged):
    """A manifest that is not what was written."""


class CheckedRows:
    """The rows of a tensor in a file; whatever is read is held against its checksum, every time.

    The file is `<name>.<kind>.safetensors` or `<name>.safetensors`, `name` 32 hexadecimal digits. Beside the tensor
    [N, ...] it holds `checksums` [N]: see `checksums`.
    """

    def __init__(self, path: Path, tensor: str):
        """
        Raises:
          UserError: missing, or malformed; `Damaged` where it holds something else.
        """
        tensors = read_tensors(path, REMEDY)
        try:
            self.rows, self._sums = tensors[tensor], tensors["checksums"]
        except KeyError as error:
            raise Damaged(f"{path}: damaged: no {error}; {REMEDY}") from error
        if self.rows.ndim < 2 or self._sums.shape != self.rows.shape[:1] or self._sums.dtype != np.int64:
            raise Damaged(f"{path}: damaged: {self._sums.shape} checksums for {self.rows.shape}; {REMEDY}")
        self.path, self._sums = path, self._sums.view(np.uint64)

    def read(self, places: np.ndarray) -> np.ndarray:
        """[n, ...]: a copy of these rows.

        Args:
          places: [n] int64.

        Raises:
          Damaged: naming the file and the row that is not what was written.
        """
        rows = self.rows[places]
        self._hold(rows, places)
        return rows

    def verify(self) -> None:
        """Every row.

        Raises:
          Damaged: as `read` does.
        """
        self._hold(self.rows, np.arange(len(self.rows)))

    def _hold(self, rows: np.ndarray, places: np.ndarray) -> None:
        if len(wrong := np.flatnonzero(checksums(rows, self.path, places) != self._sums[places])):
            raise Damaged(f"{self.path}: damaged: row {places[wrong[0]]} is not what was written; {REMEDY}")


def checksums(rows: np.ndarray, path: Path, places: np.ndarray) -> np.ndarray:
    """[n] uint64: XXH3 of each row's bytes, which depends on the file's name and the row's place in it, too.

    Args:
      rows: [n, ...], contiguous.
      path: of the file; the first 16 digits of its name count.
      places: [n] int64.
    """
    first = int(path.name[:16], 16)
    seeds = [(first + place) & _WORD for place in places.tolist()]
    raw: Any = rows.view(np.uint8).reshape(len(rows), rows[0].nbytes if len(rows) else 1)
    return np.fromiter(map(xxhash.xxh3_64_intdigest, raw, seeds), np.uint64, len(rows))


def _hold(path: Path) -> BinaryIO:
    """The manifest, open: as long as it is, `e2p prefixes` removes nothing that it names, where the storage has locks.

    Raises:
      UserError: missing.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent}: no {path.name}: not a prefix table, or unfinished; rerun `e2p prefixes`"
        ) from error
    except OSError as error:
        raise DamagedManifest(f"{path}: damaged ({error}); {REMEDY}") from error
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def read_manifest(path: Path) -> dict[str, Any]:
    """
    Raises:
      DamagedManifest: truncated or altered.
      UserError: missing, or of an earlier version.
    """
    with _hold(path) as file:
        return parse_manifest(path, file.read())


def parse_manifest(path: Path, held: bytes) -> dict[str, Any]:
    """
    Raises:
      DamagedManifest: truncated or altered.
      UserError: of an earlier version.
    """
    try:
        manifest = json.loads(held)
        if manifest.pop("checksum", None) == manifest_checksum(manifest):
            return manifest
        reason = "it is not what was written"
        if "format" not in manifest and "shards" in manifest:
            raise UserError(
                f"{path}: a table from an earlier version of e2p_jax, without checksums; run `e2p prefixes` with a new "
                "--out"
            )
    except (ValueError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        reason = f"{error}"
    raise DamagedManifest(f"{path}: damaged ({reason}); {REMEDY}")


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Of what it says, however it is spaced."""
    return xxhash.xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def ids_name(path: Path) -> str:
    """The name that a file of user ids has in a table: a digest of what it holds."""
    return file_digest(path)[:32]


def directory_name(path: Path) -> str:
    """The name that a directory of files has in a table: a digest of what they hold."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        held = file.read_bytes()
        digest.update(f"{file.name} {len(held)}\n".encode() + held)
    return digest.hexdigest()[:32]


def _most_mapped() -> int | None:
    """A mapped file holds a descriptor; three quarters of those that a process may have are left to others."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if most == resource.RLIM_INFINITY else max(most // 4, 1)


def _open_shard(
    directory: Path, shards: Sequence[dict[str, Any]], shape: tuple[int, int], dtype: str, number: int
) -> CheckedRows:
    name, users = shards[number]["name"], shards[number]["users"]
    shard = CheckedRows(directory / f"{name}.safetensors", "prefixes")
    if shard.rows.shape != (users, *shape) or shard.rows.dtype.name != dtype:
        raise UserError(
            f"{shard.path}: holds {shard.rows.dtype} {shard.rows.shape}, {MANIFEST} says {dtype} {(users, *shape)}; "
            f"{REMEDY}"
        )
    return shard
