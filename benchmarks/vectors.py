"""Opening a table of user vectors and looking users up, on made-up vectors: prints one line of JSON.

    python benchmarks/vectors.py --users 10000000 --width 128 --workdir /tmp/vectors

The table is written once (float16), indexed, then opened and read by a fresh process that imports no JAX, in batches of
random user ids (`lookup`: ids to float32 vectors; `gather`: the part from rows on). Rates are users a second on one
core, by the wall clock and by processor time; on a machine that others use, the second is the fairer one. Memory is
what `/proc/self/status` says, mapped pages of the system's file cache included: resident (VmRSS) before the table is
opened, then, and when all is done; the part of that which is the process's own (RssAnon); and the peak (VmHWM).
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tyro

BLOCK = 1 << 18  # users made at once


def write_table(path: Path, users: int, width: int) -> float:
    """Vectors and ids block by block; returns the seconds that indexing them took."""
    from e2p_jax.data.user_index import UserIndex

    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(path / "embeddings.npy", "w+", np.float16, (users, width))
    with (path / "ids.txt").open("w", encoding="utf-8") as file:
        for first in range(0, users, BLOCK):
            block = vectors[first : first + BLOCK]
            block[...] = rng.standard_normal(block.shape, np.float32)
            file.writelines(f"user-{user}\n" for user in range(first, first + len(block)))
    vectors.flush()
    meta = {"name": "benchmark", "version": "1", "width": width, "dtype": "float16"}
    (path / "meta.json").write_text(json.dumps(meta))
    started = time.perf_counter()
    UserIndex.open(path / "ids.txt").save(path / "index.npy")
    return time.perf_counter() - started


def memory() -> dict[str, int]:
    """Megabytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("Vm", "Rss"))}


def measure(path: Path, users: int, batch: int, batches: int) -> dict[str, float]:
    """In a process of its own."""
    from e2p_jax.data.embeddings import load_table

    before = memory()["VmRSS"]
    started = time.perf_counter()
    table = load_table(str(path))
    opened = time.perf_counter() - started
    after_open = memory()["VmRSS"]
    rng = np.random.default_rng(1)
    seconds = np.zeros((batches, 4))  # lookup by wall and processor, gather by wall and processor
    for number in range(batches):
        asked = rng.integers(0, users, batch)
        ids = [f"user-{user}" for user in asked.tolist()]
        clock = time.perf_counter(), time.process_time()
        table.lookup(ids, ids)
        middle = time.perf_counter(), time.process_time()
        table.gather(asked)
        last = time.perf_counter(), time.process_time()
        seconds[number] = (*np.subtract(middle, clock), *np.subtract(last, middle))
    wall, cpu, gather_wall, gather_cpu = np.round(batch / np.median(seconds, axis=0)).astype(int).tolist()
    end = memory()
    return {
        "open_s": round(opened, 3),
        "lookup_per_s": wall,
        "lookup_per_cpu_s": cpu,
        "gather_per_s": gather_wall,
        "gather_per_cpu_s": gather_cpu,
        "resident_before_mb": before,
        "resident_open_mb": after_open,
        "resident_mb": end["VmRSS"],
        "private_mb": end["RssAnon"],
        "peak_resident_mb": end["VmHWM"],
    }


def main(
    workdir: Path,
    users: int = 1_000_000,
    width: int = 128,
    batch: int = 16_384,
    batches: int = 64,
    reader: bool = False,
) -> None:
    """Measures a table.

    Args:
      workdir: New directory for the table; removed at the end.
      users: How many.
      width: E, of a user vector.
      batch: Users looked up at once.
      batches: How often; the median is told.
      reader: Only read the table that is in `workdir`, and leave it there.
    """
    if reader:
        print(json.dumps(measure(workdir, users, batch, batches)))
        return
    indexed = write_table(workdir, users, width)
    command = [sys.executable, __file__, "--reader", "--workdir", str(workdir), "--users", str(users)]
    command += ["--batch", str(batch), "--batches", str(batches)]
    read = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(workdir)
    print(json.dumps({"users": users, "width": width, "batch": batch, "index_s": round(indexed, 1), **read}))


if __name__ == "__main__":
    tyro.cli(main)
