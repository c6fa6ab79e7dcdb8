"""Looks up users' soft tokens in a table that `e2p prefixes` wrote. Imports neither jax, torch nor transformers."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e2p_jax.errors import UserError
from e2p_jax.tensors import read_tensors

MANIFEST = "manifest.json"
REMEDY = "rerun `e2p prefixes`"  # of a damaged file


class PrefixTable:
    """User id -> soft tokens. The rows stay on disk, memory-mapped; the ids are held in memory.

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
        shards = self.manifest["shards"]
        self._users_a_shard = shards[0]["users"]  # of all but the last
        self._shards: list[np.ndarray] = []
        self._rows: dict[str, int] = {}
        for shard in shards:
            self._open(shard["name"], shard["users"])
        if len(self) != self.manifest["users"]:
            raise UserError(f"{directory}: holds {len(self)} users, {MANIFEST} says {self.manifest['users']}")

    def _open(self, name: str, users: int) -> None:
        rows = read_tensors(self.directory / f"{name}.safetensors", REMEDY)["prefixes"]
        ids = self.directory / f"{name}.ids.txt"
        names = ids.read_bytes().decode().removesuffix("\n").split("\n") if ids.is_file() else []
        if rows.shape != (users, *self.shape) or rows.dtype.name != self.manifest["dtype"] or len(names) != users:
            raise UserError(
                f"{self.directory}: shard {name} holds {rows.dtype} {rows.shape} and {len(names)} ids, {MANIFEST} says "
                f"{self.manifest['dtype']} {(users, *self.shape)}; delete the shard and rerun `e2p prefixes`"
            )
        self._rows.update(zip(names, range(len(self._rows), len(self._rows) + users), strict=True))
        self._shards.append(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, user: str) -> bool:
        return user in self._rows

    def lookup(self, users: Sequence[str]) -> np.ndarray:
        """[N, K, D] in the table's dtype.

        Raises:
          UserError: naming the user who is not in the table.
        """
        out = np.empty((len(users), *self.shape), self._shards[0].dtype)
        for place, user in enumerate(users):
            if user not in self._rows:
                raise UserError(f"{self.directory}: user {user!r} has no prefix; add the vector, rerun `e2p prefixes`")
            shard, row = divmod(self._rows[user], self._users_a_shard)
            out[place] = self._shards[shard][row]
        return out
