"""Every user's soft tokens, projected once, to be looked up when serving.

A prefix table is a directory. `<digest>.ids.txt` holds the user ids, one a line, `<digest>.index.npy` the index that
finds a line (`e2p_jax.data.user_index`). Shards, `<digest>.safetensors` (`prefixes` [n, K, D]), hold the lines' soft
tokens in their order; all but the last have the same n. A shard's digest covers the projector, dtype, ids and vectors
that it was made from, so a shard that is there is right: a killed run goes on with what is missing, and an update
projects only shards in which something changed. `manifest.json` names these files; it is swapped when all are there, so
that readers see the old table or the new one. `token_embeddings.safetensors`, `tokenizer/` and, where vLLM's chat
endpoint can say what the run was trained on, `chat_template.jinja` are for `e2p_jax.export.client`.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from e2p_jax.data.embeddings import UserTable
from e2p_jax.data.user_index import UserIndex
from e2p_jax.errors import UserError
from e2p_jax.export.engines import SERVING_TEMPLATE, can_chat, serving_template
from e2p_jax.export.prefix_reader import MANIFEST, REMEDY, ids_name
from e2p_jax.export.tokenizer import save_tokenizer
from e2p_jax.files import replace_directory, write_text
from e2p_jax.parallel import distributed
from e2p_jax.parallel.mesh import replicated
from e2p_jax.prefix.projector import Projector
from e2p_jax.tensors import read_tensors
from e2p_jax.train.partition import refuse_trained_backbone
from e2p_jax.train.run import Run

SHARD_BYTES = 1 << 26  # about; a shard is one call of the compiled projection
TOKEN_EMBEDDINGS = "token_embeddings.safetensors"
TOKENIZER = "tokenizer"
_DIGEST_BYTES = 16
_BLOCK = 1 << 16  # user ids written at once
_NAMED = re.compile(r"([0-9a-f]{32})\.(safetensors|ids\.txt|index\.npy)")
_TEMPORARY = re.compile(r"\..*\.tmp(\.npy)?")


def export_prefixes(run: Run, out: Path, dtype: str) -> None:
    """Projects every user of the run's table; rerun it to finish what was killed, or after vectors changed.

    Args:
      dtype: of the soft tokens: float32, float16 or bfloat16.

    Of several processes each projects its part of the users; the first one writes what is not a shard.

    Raises:
      UserError: no table, a vector that is not finite, or `out` holds something else.
    """
    config, table = run.inputs.config, run.inputs.table
    refuse_trained_backbone(run.model.mask)
    if not table:
        raise UserError("the run names no table of user vectors, or an empty one; give --embeddings TABLE")
    _refuse_foreign(out, run.model.fingerprint)
    out.mkdir(parents=True, exist_ok=True)
    is_update = (out / MANIFEST).is_file()
    projector = nnx.merge(run.model.graph, run.model.params).projector
    made_by = f"{projector_hash(projector)} {dtype} {len(table)}"
    distributed.check_same("projector or vectors", lambda: hashlib.sha256(made_by.encode()).digest())
    ids = write_ids(table, out) if distributed.is_first() else ""
    shards = project_table(projector, table, out, dtype)
    embeddings = _token_embeddings(run)
    if not distributed.is_first():
        return
    if not is_update:  # else they are the same backbone's
        _save(out / TOKEN_EMBEDDINGS, {"embeddings": np.asarray(embeddings)})
    with replace_directory(out / TOKENIZER) as temporary:
        save_tokenizer(run, temporary)
    chat = can_chat(run.inputs.encoder)
    if chat:
        write_text(out / SERVING_TEMPLATE, serving_template(run.inputs.encoder.template))
    path, revision = run.inputs.published()
    manifest = {
        "projector": projector_hash(projector),
        "step": run.step,
        "backbone": {
            "path": path,
            "revision": revision,
            "fingerprint": run.model.fingerprint,
        },
        "table": _describe(config.data.embeddings or "", table),
        "placement": config.prefix.placement,
        "chat": chat,
        "embedding_scale": run.inputs.decoder.embedding_scale,
        "num_tokens": config.projector.num_tokens,
        "width": run.inputs.decoder.hidden_size,
        "dtype": dtype,
        "users": len(table),
        "ids": ids,
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "config": dataclasses.asdict(config),
    }
    write_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    _remove_unnamed(out, {ids, *(shard.name for shard in shards)})


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a table."""

    name: str  # the digest of what it was made from
    users: int


def project_table(projector: Projector, table: UserTable, out: Path, dtype: str) -> list[Shard]:
    """Writes the shards of `table` that are not yet in `out`: rows over all devices, one shape, one compilation.

    Of n processes each takes every n-th shard, reads those vectors alone, and projects them on its own devices. While
    the devices project a shard, the one before is written.

    Returns:
      All shards of the table, in row order; all but the last hold the same number of users. They are all there, on
      every process.

    Raises:
      UserError: naming the user whose vector is not finite.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    graph, state = nnx.split(projector)
    state = jax.device_put(jax.tree.map(np.asarray, state), NamedSharding(mesh, P()))
    rows = rows_a_shard(projector, dtype)
    padded = -(-rows // mesh.size) * mesh.size
    by_row = NamedSharding(mesh, P("rows"))

    def project(state: nnx.State, vectors: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(vectors).astype(dtype)

    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(project, n=1), out_shardings=by_row)
    ids, made_by = table.ids, f"{projector_hash(projector)} {dtype}\n".encode()
    digests = np.zeros((-(-len(ids) // rows), _DIGEST_BYTES), np.uint8)
    waiting: tuple[Path, Shard, jax.Array] | None = None
    for number in range(jax.process_index(), len(digests), jax.process_count()):
        shard, vectors = _shard(made_by, table, ids.rows(slice(number * rows, (number + 1) * rows)))
        digests[number] = np.frombuffer(bytes.fromhex(shard.name), np.uint8)
        if _complete(out, shard, projector):
            continue
        whole = np.zeros((padded, vectors.shape[1]), np.float32)
        whole[: len(vectors)] = vectors
        projected = compiled(state, jax.device_put(whole, by_row))
        if waiting:
            _write(*waiting)
        waiting = out, shard, projected
    if waiting:
        _write(*waiting)
    everywhere = distributed.gather(digests).max(axis=0)  # zero where another process has the shard
    return [Shard(bytes(each).hex(), min(rows, len(ids) - number * rows)) for number, each in enumerate(everywhere)]


def rows_a_shard(projector: Projector, dtype: str) -> int:
    """A power of two, whatever the devices, so that shards are the same on another machine."""
    width = projector.skip[...].shape[1]  # K * D
    return 1 << max((SHARD_BYTES // (width * jnp.dtype(dtype).itemsize)).bit_length() - 1, 0)


def projector_hash(projector: Projector) -> str:
    """SHA-256 over K and every parameter's and statistic's name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{projector.num_tokens}\n".encode())
    for path, variable in sorted(nnx.to_flat_state(nnx.state(projector))):
        value = np.ascontiguousarray(np.asarray(variable.get_value()))
        digest.update(f"{'/'.join(map(str, path))} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def write_ids(table: UserTable, out: Path) -> str:
    """Writes the user ids and their index, unless they are there, and returns their name.

    Raises:
      UserError: naming a user whose id does not fit on a line.
    """
    temporary, ids = out / ".ids.tmp", table.ids
    with temporary.open("wb") as file:
        for first in range(0, len(ids), _BLOCK):
            rows = ids.rows(slice(first, first + _BLOCK))
            lines = table.index.lines(rows)
            if lines.count(b"\n") >= len(rows):
                broken = next(user for user in table.index.ids(rows) if "\n" in user)
                raise UserError(f"{table.source}: user id {broken!r} holds a line break; rename that user")
            file.write(lines + b"\n")
    name = ids_name(temporary)
    index = out / f"{name}.index.npy"
    if not index.is_file():
        unfinished = out / ".index.tmp.npy"
        UserIndex.open(temporary).save(unfinished)
        os.replace(unfinished, index)
    os.replace(temporary, out / f"{name}.ids.txt")
    return name


def _shard(made_by: bytes, table: UserTable, rows: np.ndarray) -> tuple[Shard, np.ndarray]:
    """The shard of some rows, and their vectors ([n, E] float32)."""
    vectors = table.gather(rows)
    digest = hashlib.sha256(made_by + table.index.lines(rows) + b"\n\n")
    digest.update(vectors.data)
    return Shard(digest.hexdigest()[: 2 * _DIGEST_BYTES], len(rows)), vectors


def _token_embeddings(run: Run) -> jax.Array:
    """[V, D], whole on every device."""
    tokens = jnp.arange(run.inputs.decoder.vocab_size)[None]

    def embed(params: Any) -> jax.Array:
        return nnx.merge(run.model.graph, params).backbone.embed(tokens)[0]

    return jax.jit(embed, out_shardings=replicated(run.model.mesh))(run.model.params)


def _complete(out: Path, shard: Shard, projector: Projector) -> bool:
    """Whether a run before this one wrote the shard, which is moved into place."""
    shape = (shard.users, projector.num_tokens, projector.token_mean[...].shape[0])
    try:
        return read_tensors(out / f"{shard.name}.safetensors", REMEDY)["prefixes"].shape == shape
    except UserError:  # missing or damaged
        return False


def _write(out: Path, shard: Shard, projected: jax.Array) -> None:
    _save(out / f"{shard.name}.safetensors", {"prefixes": np.asarray(projected)[: shard.users]})


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, temporary)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def _describe(embeddings: str, table: UserTable) -> dict[str, Any]:
    """Name and version of the vectors, as far as they have any."""
    meta = Path(embeddings).expanduser() / "meta.json"
    known = json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}
    return {"name": known.get("name", Path(embeddings).name), "version": known.get("version"), "source": table.source}


def _refuse_foreign(out: Path, fingerprint: str) -> None:
    known = {MANIFEST, TOKEN_EMBEDDINGS, TOKENIZER, SERVING_TEMPLATE}
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose a new directory")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    foreign = [n for n in names if n not in known and not _NAMED.fullmatch(n) and not _TEMPORARY.fullmatch(n)]
    if foreign:
        raise UserError(f"--out {out}: holds other files ({', '.join(foreign[:3])}); choose a new directory")
    if MANIFEST in names:
        there = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["backbone"]["fingerprint"]
        if there != fingerprint:
            raise UserError(f"--out {out}: holds the table of another backbone ({there[:12]}); choose a new directory")


def _remove_unnamed(out: Path, named: set[str]) -> None:
    """What the manifest no longer names, and what a killed run left half written."""
    for path in out.iterdir():
        known = _NAMED.fullmatch(path.name)
        if (known and known[1] not in named) or _TEMPORARY.fullmatch(path.name):
            path.unlink()
