"""Looks up users' soft tokens in a table that `e2p prefixes` wrote. Imports neither jax, torch nor transformers."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e2p_jax.data.user_index import UserIndex
from e2p_jax.errors import UserError
from e2p_jax.tensors import read_tensors

MANIFEST = "manifest.json"
REMEDY = "rerun `e2p prefixes`"  # of a damaged file


class PrefixTable:
    """User id -> soft tokens. Rows, ids and their index stay on disk, memory-mapped.

    An update of the table swaps its manifest: a reader keeps what it opened until it is made anew.
    """

    def __init__(self, directory: Path, fingerprint: str | None = None):
        """
        Args:
          directory: what `e2p prefixes` wrote.
          fingerprint: of the backbone that will read the soft tokens, to be held against the table's
            (`backbone.json` of a run, `config.json` of an export).

        Raises:
          UserError: unfinished, damaged, or made for another backbone.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise UserError(f"{directory}: no {MANIFEST}: not a prefix table, or unfinished; rerun `e2p prefixes`")
        self.directory, self.manifest = directory, json.loads(path.read_text(encoding="utf-8"))
        there = self.manifest["backbone"]["fingerprint"]
        if fingerprint is not None and fingerprint != there:
            raise UserError(
                f"{directory}: made for a backbone with fingerprint {there[:12]}, not {fingerprint[:12]}; "
                "serve that backbone, or project the users again with a run of yours"
            )
        self.shape = (int(self.manifest["num_tokens"]), int(self.manifest["width"]))  # K, D
        self._index = self._open_ids(self.manifest["ids"])
        self._shards = [self._open(shard["name"], shard["users"]) for shard in self.manifest["shards"]]
        self._users_a_shard = len(self._shards[0])  # of all but the last

    def _open_ids(self, name: str) -> UserIndex:
        path = self.directory / f"{name}.ids.txt"
        if not path.is_file() or ids_name(path) != name:
            raise UserError(f"{path}: missing or damaged; {REMEDY}")
        return UserIndex.open(path, self.directory / f"{name}.index.npy")

    def _open(self, name: str, users: int) -> np.ndarray:
        rows = read_tensors(self.directory / f"{name}.safetensors", REMEDY)["prefixes"]
        if rows.shape != (users, *self.shape) or rows.dtype.name != self.manifest["dtype"]:
            raise UserError(
                f"{self.directory}: shard {name} holds {rows.dtype} {rows.shape}, {MANIFEST} says "
                f"{self.manifest['dtype']} {(users, *self.shape)}; delete the shard and rerun `e2p prefixes`"
            )
        return rows

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, user: str) -> bool:
        return bool(self._index.find([user])[0] >= 0)

    def lookup(self, users: Sequence[str]) -> np.ndarray:
        """[N, K, D] in the table's dtype.

        Raises:
          UserError: naming the user who is not in the table.
        """
        rows = self._index.find(users)
        if len(absent := np.flatnonzero(rows < 0)):
            user = users[int(absent[0])]
            raise UserError(f"{self.directory}: user {user!r} has no prefix; add the vector, rerun `e2p prefixes`")
        out = np.empty((len(users), *self.shape), self._shards[0].dtype)
        shards, places = np.divmod(rows, self._users_a_shard)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._shards[shard][places[here]]
        return out


def ids_name(path: Path) -> str:
    """The name that a file of user ids has in a table: a digest of what it holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
