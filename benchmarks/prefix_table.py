"""Throughput and memory of `e2p prefixes`, on made-up users: prints one line of JSON.

    python benchmarks/prefix_table.py --users 1000000 --width 128 --model-width 2048 --workdir /tmp/prefixes

Timed: the first pass over all users (compilation included), a pass that finds nothing to do, an update after one
vector changed, opening the finished table, and 10,000 look-ups. `write_floor_s` is what writing the same bytes takes
without projecting anything; a first pass near it is bound by the disk. `cpu_s` is the processor time of the first pass.
"""

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from flax import nnx

from e2p_jax.data.embeddings import UserTable
from e2p_jax.export.prefix_reader import MANIFEST, PrefixTable
from e2p_jax.export.prefix_table import Shard, project_table
from e2p_jax.prefix.projector import Projector

BLOCK = 1 << 16  # users made at once


def make_table(path: Path, users: int, width: int) -> UserTable:
    """[users, width] float32 on disk, memory-mapped."""
    rng = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (users, width))
    for first in range(0, users, BLOCK):
        vectors[first : first + BLOCK] = rng.standard_normal(vectors[first : first + BLOCK].shape, np.float32)
    vectors.flush()
    return UserTable([f"user-{user}" for user in range(users)], np.load(path, mmap_mode="r+"), "benchmark")


def write_floor(path: Path, size: int) -> float:
    """Seconds to write `size` bytes that came from no computation."""
    block = np.random.default_rng(1).bytes(1 << 26)
    started = time.perf_counter()
    with path.open("wb") as file:
        for first in range(0, size, len(block)):
            file.write(block[: size - first])
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


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
    vectors = make_table(workdir / "vectors.npy", users, width)
    projector = Projector(
        embedding_width=width,
        model_width=model_width,
        num_tokens=num_tokens,
        kind="mlp",
        hidden_size=512,
        dropout=0.0,
        rngs=nnx.Rngs(0),
    )
    out = workdir / "table"
    out.mkdir()
    shards: list[Shard] = []

    def timed() -> float:
        started = time.perf_counter()
        shards[:] = project_table(projector, vectors, out, dtype)
        return time.perf_counter() - started

    cpu = time.process_time()
    seconds = {"first": timed()}
    cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds["unchanged"] = timed()
    vectors.vectors[users // 2] += 1
    seconds["one_changed"] = timed()
    manifest = {
        "backbone": {"fingerprint": ""},
        "num_tokens": num_tokens,
        "width": model_width,
        "dtype": dtype,
        "users": users,
        "shards": [{"name": shard.name, "users": shard.users} for shard in shards],
    }
    (out / MANIFEST).write_text(json.dumps(manifest))
    started = time.perf_counter()
    table = PrefixTable(out)
    seconds["open"] = time.perf_counter() - started
    some = [f"user-{user}" for user in np.random.default_rng(2).integers(0, users, 10_000)]
    started = time.perf_counter()
    table.lookup(some)
    seconds["lookup_10000"] = time.perf_counter() - started
    size = users * num_tokens * model_width * np.dtype(table.lookup(some[:1]).dtype).itemsize
    seconds["write_floor"] = write_floor(workdir / "floor", size)
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
        "peak_rss_mb": round(peak / 1024),
        **{f"{name}_s": round(value, 3) for name, value in seconds.items()},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    tyro.cli(main)
