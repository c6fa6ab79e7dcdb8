"""Throughput and memory of `e2p prefixes`, on made-up users: prints one line of JSON.

    python benchmarks/prefix_table.py --users 10000000 --width 128 --model-width 192 --workdir /tmp/prefixes

Timed: the first pass over all users (compilation included) with its processor time and peak memory, a pass that finds
nothing to do, an update after one vector changed, opening the finished table, and `get_many` of 10,000 users in one
call, the first and the median of those after it. Beside them, what
bounds the first pass: `device_s` is the projection alone, one shard after the other from vectors in memory, and
`write_floor_s` what writing the same bytes takes that came from no computation. Both written to the disk, not to its
cache (`fsync`).
"""

import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from flax import nnx

from e2p_jax.datasets.prepared import load_table
from e2p_jax.export.prefix_files import write_ids, write_manifest
from e2p_jax.export.prefix_reader import PrefixTable
from e2p_jax.export.prefix_table import Shard, project_table, rows_a_shard
from e2p_jax.prefix import mlp
from e2p_jax.prefix.projector import Projector
from e2p_jax.vectors.index import UserIndex
from e2p_jax.vectors.table import UserTable

BLOCK = 1 << 16  # users made at once


def make_table(path: Path, users: int, width: int) -> UserTable:
    """[users, width] float32 in a table directory, opened as `e2p` opens one."""
    path.mkdir()
    rng = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(path / "embeddings.npy", "w+", np.float32, (users, width))
    with (path / "ids.txt").open("w") as ids:
        for first in range(0, users, BLOCK):
            block = vectors[first : first + BLOCK]
            block[...] = rng.standard_normal(block.shape, np.float32)
            ids.writelines(f"user-{user}\n" for user in range(first, first + len(block)))
    vectors.flush()
    (path / "meta.json").write_text(json.dumps({"width": width}))
    UserIndex.open(path / "ids.txt").save(path / "index.npy")
    return load_table(str(path))


def write_floor(path: Path, size: int) -> float:
    """Seconds to write `size` bytes that came from no computation."""
    block = np.random.default_rng(1).bytes(1 << 26)
    started = time.perf_counter()
    with path.open("wb") as file:
        for first in range(0, size, len(block)):
            file.write(block[: size - first])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def device_time(projector: Projector, users: int, width: int, dtype: str) -> float:
    """Seconds to project as many users on one device, in calls of a shard."""
    rows = min(rows_a_shard(projector, dtype), users)
    vectors = jax.random.normal(jax.random.key(0), (rows, width))
    project = nnx.jit(lambda projector, vectors: projector(vectors).astype(dtype))
    jax.block_until_ready(project(projector, vectors))
    started = time.perf_counter()
    for _ in range(-(-users // rows)):
        jax.block_until_ready(project(projector, vectors))
    return time.perf_counter() - started


class Peak:
    """The most memory that this process holds from here on, as the kernel counts it (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.own_before = self.read(), self.own()

    def read(self) -> int:
        """In bytes, mapped files included as far as they are in memory."""
        return self._status("VmHWM")

    def own(self) -> int:
        """What it holds now, in bytes, without mapped files, whose memory the kernel takes back when it is short."""
        return self._status("RssAnon")

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def main(
    workdir: Path,
    users: int = 100_000,
    width: int = 128,
    model_width: int = 2048,
    num_tokens: int = 1,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
) -> None:
    """Measures a table.

    Args:
      workdir: Empty or new directory for the vectors and the table; removed at the end.
      users: How many.
      width: E, of a user vector.
      model_width: D.
      num_tokens: K.
      dtype: Of the soft tokens.
    """
    workdir.mkdir(parents=True)
    table = make_table(workdir / "vectors", users, width)
    projector = Projector(
        mlp.Settings(num_tokens=num_tokens, hidden_size=512, dropout=0.0),
        embedding_width=width,
        model_width=model_width,
        rngs=nnx.Rngs(0),
    )
    out = workdir / "table"
    out.mkdir()
    ids, shards = "", list[Shard]()

    def timed() -> float:
        nonlocal ids
        started = time.perf_counter()
        ids = write_ids(table, out, [])
        shards[:] = project_table(projector, table, out, dtype, [])[0]
        os.sync()
        return time.perf_counter() - started

    cpu, peak = time.process_time(), Peak()
    seconds = {"first": timed()}
    cpu, memory = time.process_time() - cpu, peak.read()
    seconds["unchanged"] = timed()
    change = np.load(workdir / "vectors" / "embeddings.npy", mmap_mode="r+")
    change[users // 2] += 1
    change.flush()
    seconds["one_changed"] = timed()
    manifest = {
        "backbone": {"fingerprint": ""},
        "num_tokens": num_tokens,
        "width": model_width,
        "dtype": dtype,
        "users": users,
        "ids": ids,
        "shards": [{"name": shard.name, "users": shard.users} for shard in shards],
    }
    write_manifest(out, manifest)
    peak, started = Peak(), time.perf_counter()
    prefixes = PrefixTable(out)
    seconds["open"] = time.perf_counter() - started
    some = [f"user-{user}" for user in np.random.default_rng(2).integers(0, users, 10_000)]
    calls = []
    for _ in range(21):
        started = time.perf_counter()
        prefixes.get_many(some)
        calls.append(time.perf_counter() - started)
    seconds["get_many_10000_first"], seconds["get_many_10000"] = calls[0], statistics.median(calls[1:])
    reader, own = peak.read() - peak.before, peak.own() - peak.own_before
    size = users * num_tokens * model_width * np.dtype(prefixes.lookup(some[:1]).dtype).itemsize
    seconds["write_floor"] = write_floor(workdir / "floor", size)
    seconds["device"] = device_time(projector, users, width, dtype)
    shutil.rmtree(workdir)
    figures = {
        "users": users,
        "width": width,
        "model_width": model_width,
        "num_tokens": num_tokens,
        "dtype": dtype,
        "devices": f"{jax.device_count()} {jax.default_backend()}",
        "users_per_s": round(users / seconds["first"]),
        "written_mb_per_s": round(size / seconds["first"] / 1e6, 1),
        "cpu_s": round(cpu, 1),
        "peak_mb": round(memory / 1e6),
        "reader_mb": round(reader / 1e6),
        "reader_own_mb": round(own / 1e6),
        "get_many_rows_per_s": round(10_000 / seconds["get_many_10000"]),
        **{f"{name}_s": round(value, 3) for name, value in seconds.items()},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    tyro.cli(main)
