"""Every user's soft tokens, projected once, to be looked up when serving.

A prefix table is a directory. `<digest>.ids.txt` holds the user ids, one a line, `<digest>.index.npy` the index that
finds a line (`e2p_jax.vectors.index`). Shards, `<digest>.safetensors` (`prefixes` [n, K - S, D]), hold the lines' own
soft tokens in their order; all but the last have the same n. A shard's digest covers the projector, dtype, ids and
vectors that it was made from, so a shard that is there and whole is right: a killed run goes on with what is missing,
and an update projects only shards in which something changed. `<digest>.tokens.safetensors` (`embeddings` [V, D],
which the model multiplies by the manifest's `token_scale`), `<digest>.tokenizer/`, `<digest>.projector.safetensors`
(every parameter by name; `common` [S, D], the soft tokens that all users share; `null` [K, D], the null user's) and,
where vLLM's chat endpoint can say what the run was trained on, `chat_template.jinja` are for `e2p_jax.export.client`.

Nothing is silently damaged: every row of a shard or of the token embeddings has a checksum beside it (`checksums` [n]),
ids and tokenizer are named by what they hold, index and manifest carry a checksum of their own. `export_prefixes`
writes again what is damaged or missing.

Nobody sees half an update: what is new has a new name, `manifest.json` names all and is swapped last. The manifest that
was there stays as `<checksum>.manifest.json`, with all that it names, for `keep_hours` and while a reader holds it: it
can be put back (`e2p rollback`).
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from e2p_jax.errors import UserError
from e2p_jax.export.common import refuse_not_of_users
from e2p_jax.export.engines import can_chat, model_type, serving_template
from e2p_jax.export.prefix_files import (
    files_of,
    intact,
    open_out,
    save_rows,
    swap,
    write_ids,
    write_projector,
    write_tokenizer,
    write_tokens,
)
from e2p_jax.export.prefix_reader import SERVING_TEMPLATE
from e2p_jax.files import explain_full_disk, write_text
from e2p_jax.parallel import distributed
from e2p_jax.parallel.mesh import replicated
from e2p_jax.prefix.projector import Projector
from e2p_jax.train.run import Run
from e2p_jax.vectors.table import UserTable

SHARD_BYTES = 1 << 26  # about; a shard is one call of the compiled projection
LEAST_ROWS = 4096  # of a call, in a shard of as many: far fewer are multiplied in another order, to other last bits
KEEP_HOURS = 24.0
FORMAT = 3  # of the manifest and what it names
_DIGEST_BYTES = 16
_PROJECTED, _MENDED = 1, 2  # of a shard; 0 is kept


@dataclasses.dataclass(frozen=True)
class Written:
    """The work of one run of `export_prefixes`."""

    users: int
    shards: int
    projected: int  # shards
    mended: tuple[str, ...]  # files that were damaged, or named by the manifest and missing

    def text(self) -> str:
        kept = self.shards - self.projected
        said = f"{self.users:,} users in {self.shards:,} shards: {self.projected:,} projected, {kept:,} kept"
        if self.mended:
            more = f" and {len(self.mended) - 3:,} more" if len(self.mended) > 3 else ""
            said += f"; damaged or missing, and written again: {', '.join(self.mended[:3])}{more}"
        return said


def export_prefixes(run: Run, out: Path, dtype: str, keep_hours: float = KEEP_HOURS) -> Written:
    """Projects every user of the run's table; rerun it to finish what was killed, to mend, or after vectors changed.

    Args:
      dtype: of the soft tokens: float32, float16 or bfloat16.
      keep_hours: how long at least what an update takes out stays, to be put back and for readers that hold it.

    Of several processes each projects its part of the users; the first one writes what is not a shard.

    Raises:
      UserError: no table, a vector or its soft tokens are not finite, `out` holds something else, or the disk is full:
        the table that was there is as it was.
    """
    table = run.inputs.table
    refuse_not_of_users(run)
    if not table:
        raise UserError("the run names no table of user vectors, or an empty one; give --embeddings TABLE")
    before, mended = open_out(out, run.model.fingerprint)
    projector = run.model.merged.projector
    parameters = _parameters(projector, dtype)
    made_by = f"{projector_hash(projector)} {dtype} {len(table)}"
    distributed.check_same("projector or vectors", lambda: hashlib.sha256(made_by.encode()).digest())
    with explain_full_disk(out):
        missing = files_of(before) - {path.name for path in out.iterdir()}
        ids = write_ids(table, out, mended) if distributed.is_first() else ""
        shards, projected = project_table(projector, table, out, dtype, mended)
        embeddings = _token_embeddings(run)
        if distributed.is_first():
            manifest = _describe(run, table, dtype) | {
                "ids": ids,
                "shards": [dataclasses.asdict(shard) for shard in shards],
                "tokens": write_tokens(out, narrowest(np.asarray(embeddings)), mended),
                "tokenizer": write_tokenizer(run, out, mended),
                "parameters": write_projector(out, parameters, mended),
            }
            if manifest["chat"]:
                write_text(out / SERVING_TEMPLATE, serving_template(run.inputs.encoder.template))
            swap(out, before, manifest, keep_hours)
            mended.extend(sorted(missing & files_of(manifest)))
    return Written(len(table), len(shards), projected, tuple(mended))


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a table."""

    name: str  # the digest of what it was made from
    users: int


def project_table(
    projector: Projector, table: UserTable, out: Path, dtype: str, mended: list[str]
) -> tuple[list[Shard], int]:
    """Writes the shards of `table` that are not yet whole in `out`: rows over all devices, one shape, one compilation.

    Of n processes each takes every n-th shard, reads those vectors alone, and projects them on its own devices. While
    the devices project a shard, the one before is written.

    Args:
      mended: the names of files that were damaged are added to it.

    Returns:
      All shards of the table, in row order, of which all but the last hold the same number of users; and how many of
      them were projected. They are all there, on every process.

    Raises:
      UserError: naming the user whose vector or soft tokens are not finite; that shard is not written.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    graph, state = nnx.split(projector)
    state = jax.device_put(jax.tree.map(np.asarray, state), NamedSharding(mesh, P()))
    own, size = projector.settings.own_tokens, rows_a_shard(projector, dtype)
    padded = -(-min(size, max(len(table), LEAST_ROWS)) // mesh.size) * mesh.size
    by_row = NamedSharding(mesh, P("rows"))

    def project(state: nnx.State, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = nnx.merge(graph, state)(vectors)[:, :own].astype(dtype)
        return made, jnp.isfinite(made).all(axis=(1, 2))

    def finish(shard: Shard, rows: np.ndarray, projected: jax.Array, finite: jax.Array) -> None:
        if len(bad := np.flatnonzero(~np.asarray(finite)[: shard.users])):
            (user,) = table.index.ids(rows[bad[:1]])
            raise UserError(
                f"{table.source}: user {user!r}: the soft tokens are not finite in {dtype}; repair or drop that "
                "vector, or choose a --dtype of wider range"
            )
        _write(out, shard, projected)

    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(project, n=1), out_shardings=by_row)
    ids, made_by = table.ids, f"{FORMAT} {projector_hash(projector)} {dtype}\n".encode()
    told = np.zeros((-(-len(ids) // size), _DIGEST_BYTES + 1), np.uint8)  # digest, what was done
    waiting: tuple[Shard, np.ndarray, jax.Array, jax.Array] | None = None
    for number in range(jax.process_index(), len(told), jax.process_count()):
        rows = ids.rows(slice(number * size, (number + 1) * size))
        shard, vectors = _shard(made_by, table, rows)
        told[number, :-1] = np.frombuffer(bytes.fromhex(shard.name), np.uint8)
        path = out / f"{shard.name}.safetensors"
        shape = (shard.users, own, projector.token_mean[...].shape[0])
        if intact(path, "prefixes", shape, dtype):
            continue
        told[number, -1] = _MENDED if path.exists() else _PROJECTED
        whole = np.zeros((padded, vectors.shape[1]), np.float32)
        whole[: len(vectors)] = vectors
        made = compiled(state, jax.device_put(whole, by_row))
        if waiting:
            finish(*waiting)
        waiting = shard, rows, *made
    if waiting:
        finish(*waiting)
    told = distributed.gather(told).max(axis=0)  # zero where another process has the shard
    shards = [Shard(bytes(each[:-1]).hex(), min(size, len(ids) - size * number)) for number, each in enumerate(told)]
    mended += [f"{shard.name}.safetensors" for shard, each in zip(shards, told, strict=True) if each[-1] == _MENDED]
    return shards, int(np.count_nonzero(told[:, -1]))


def rows_a_shard(projector: Projector, dtype: str) -> int:
    """A power of two, whatever the devices, so that shards are the same on another machine."""
    width = projector.settings.own_tokens * projector.token_mean[...].shape[0]
    return 1 << max((SHARD_BYTES // (width * jnp.dtype(dtype).itemsize)).bit_length() - 1, 0)


def projector_hash(projector: Projector) -> str:
    """SHA-256 over K, the bound if there is one, and every parameter's and statistic's name, dtype, shape and bytes."""
    bound = f"{float(projector.bound)}\n" if projector.settings.max_scale else ""
    digest = hashlib.sha256(f"{projector.num_tokens}\n{bound}".encode())
    for name, value in _values(projector).items():
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _values(projector: Projector) -> dict[str, np.ndarray]:
    """Every parameter and statistic."""
    flat = sorted(nnx.to_flat_state(nnx.state(projector)))
    return {"/".join(map(str, path)): np.ascontiguousarray(np.asarray(v.get_value())) for path, v in flat}


def _parameters(projector: Projector, dtype: str) -> dict[str, np.ndarray]:
    """What readers need to project a vector, and soft tokens that are no single user's: `common` and `null`.

    Raises:
      UserError: those are not finite.
    """
    values = _values(projector)
    graph, state = nnx.split(projector)
    here = nnx.merge(graph, jax.tree.map(np.asarray, state))  # whole on this process, of however many
    if projector.settings.shared_tokens:
        common = here(jnp.asarray(values["input_mean"]))[projector.settings.own_tokens :]
        values["common"] = np.asarray(common.astype(dtype))
    if projector.null_user_rate:
        values["null"] = np.asarray(here(jnp.full_like(values["input_mean"], jnp.nan)).astype(dtype))
    for name, whose in ("common", "that all users share"), ("null", "of the null user"):
        if not np.isfinite(values.get(name, np.zeros(1)).astype(np.float32)).all():
            raise UserError(f"the soft tokens {whose} are not finite in {dtype}; choose a --dtype of wider range")
    return values


def _shard(made_by: bytes, table: UserTable, rows: np.ndarray) -> tuple[Shard, np.ndarray]:
    """The shard of some rows, and their vectors ([n, E] float32)."""
    vectors = table.gather(rows)
    digest = hashlib.sha256(made_by + table.index.lines(rows) + b"\n\n")
    digest.update(vectors.data)
    return Shard(digest.hexdigest()[: 2 * _DIGEST_BYTES], len(rows)), vectors


def _token_embeddings(run: Run) -> jax.Array:
    """[V, D], unscaled, whole on every device."""
    rows = jax.jit(lambda rows: rows[: run.inputs.decoder.vocab_size], out_shardings=replicated(run.model.mesh))
    return rows(run.model.params["backbone"]["embedding"])  # type: ignore[no-any-return]


def narrowest(rows: np.ndarray) -> np.ndarray:
    """In a dtype of two bytes that says every number exactly, if there is one: as a bfloat16 model is published that a
    run on a CPU reads in float32.
    """
    for dtype in map(jnp.dtype, ("bfloat16", "float16")):
        with np.errstate(over="ignore"):
            narrow = rows.astype(dtype)
        if np.array_equal(narrow.astype(rows.dtype), rows):
            return narrow
    return rows


def _write(out: Path, shard: Shard, projected: jax.Array) -> None:
    save_rows(out / f"{shard.name}.safetensors", "prefixes", np.asarray(projected)[: shard.users])


def _describe(run: Run, table: UserTable, dtype: str) -> dict[str, Any]:
    """Gives what the manifest says beside the names of files."""
    config, decoder = run.inputs.config, run.inputs.decoder
    path, revision = run.inputs.published()
    return {
        "format": FORMAT,
        "projector": projector_hash(run.model.merged.projector),
        "step": run.step,
        "backbone": {"path": path, "revision": revision, "fingerprint": run.model.fingerprint},
        "table": _vectors(config.data.embeddings or "", table),
        "placement": config.prefix.placement,
        "chat": can_chat(run.inputs.encoder),
        "stop_token_ids": list(run.inputs.encoder.stops),
        "token_scale": decoder.embedding_scale,
        "model_type": model_type(run),
        "num_tokens": config.projector.num_tokens,
        "own_tokens": config.projector.own_tokens,
        "width": decoder.hidden_size,
        "dtype": dtype,
        "users": len(table),
        "config": dataclasses.asdict(config),
    }


def _vectors(embeddings: str, table: UserTable) -> dict[str, Any]:
    """Name and version of the vectors, as far as they have any."""
    meta = Path(embeddings).expanduser() / "meta.json"
    known = json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}
    return {"name": known.get("name", Path(embeddings).name), "version": known.get("version"), "source": table.source}
