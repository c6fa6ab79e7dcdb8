"""Opening a table of user vectors and looking users up, on made-up vectors: prints one line of JSON.

    python benchmarks/vectors.py --users 10000000 --width 128 --workdir /tmp/vectors

The table is written (float16), indexed, then opened and read by fresh processes that import no JAX, in batches of
random user ids (`lookup`: ids to float32 vectors; `gather`: the part from rows on, other rows). The system's file cache
holds it in one of these states:

  written: as files are written, so in large pages.
  cold: pushed out of the cache; these look-ups bring it back from disk.
  read_back: as the look-ups of the state before brought it back.
  small_pages: written anew through a memory map, 4 KB at a time; so may lie a file that others read at random.

Rates are users a second on one core, by the wall clock and by processor time; on a machine that others use, the second
is the fairer one. Memory is what `/proc/self/status` says, mapped pages of the file cache included: resident (VmRSS)
before the table is opened, then, and when all is done; the part of that which is the process's own (RssAnon); and the
peak (VmHWM).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

BLOCK = 1 << 18  # users made at once


def blocks(users: int, width: int) -> Iterator[np.ndarray]:
    """Vectors, the same in every call."""
    rng = np.random.default_rng(0)
    for first in range(0, users, BLOCK):
        yield rng.standard_normal((min(BLOCK, users - first), width), np.float32).astype(np.float16)


def write_table(path: Path, users: int, width: int) -> float:
    """Vectors and ids block by block; returns the seconds that indexing them took."""
    from e2p_jax.vectors.index import UserIndex

    path.mkdir(parents=True)
    with (path / "embeddings.npy").open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (users, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks(users, width):
            file.write(block.data)
    with (path / "ids.txt").open("w", encoding="utf-8") as file:
        file.writelines(f"user-{user}\n" for user in range(users))
    meta = {"name": "benchmark", "version": "1", "width": width, "dtype": "float16"}
    (path / "meta.json").write_text(json.dumps(meta))
    started = time.perf_counter()
    UserIndex.open(path / "ids.txt").save(path / "index.npy")
    return time.perf_counter() - started


def write_in_small_pages(path: Path, users: int, width: int) -> None:
    (path / "embeddings.npy").unlink()
    vectors = np.lib.format.open_memmap(path / "embeddings.npy", "w+", np.float16, (users, width))
    for number, block in enumerate(blocks(users, width)):
        vectors[number * BLOCK : number * BLOCK + len(block)] = block
    vectors.flush()


def push_out(path: Path) -> None:
    """Out of the system's cache."""
    for part in path.iterdir():
        with part.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(path: Path) -> None:
    """Reads what is in the cache: a virtual machine may get its memory only as it first reads it."""
    for part in path.iterdir():
        with part.open("rb") as file:
            while file.read(1 << 22):
                pass


def memory() -> dict[str, int]:
    """Megabytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("Vm", "Rss"))}


def measure(path: Path, users: int, batch: int, batches: int) -> dict[str, Any]:
    """In a process of its own."""
    from e2p_jax.datasets.prepared import load_table

    before = memory()["VmRSS"]
    started = time.perf_counter()
    table = load_table(str(path))
    opened = time.perf_counter() - started
    after_open = memory()["VmRSS"]
    rng = np.random.default_rng(1)
    seconds = np.zeros((batches, 4))  # lookup by wall and processor, gather by wall and processor
    for number in range(batches):
        asked, others = rng.integers(0, users, (2, batch))
        ids = [f"user-{user}" for user in asked.tolist()]
        clock = time.perf_counter(), time.process_time()
        table.lookup(ids, ids)
        middle = time.perf_counter(), time.process_time()
        table.gather(others)
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
    command = [sys.executable, __file__, "--reader", "--workdir", str(workdir), "--users", str(users)]
    command += ["--batch", str(batch), "--batches", str(batches)]

    def read() -> dict[str, Any]:
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    indexed = write_table(workdir, users, width)
    states = {"written": read()}
    push_out(workdir)
    states["cold"] = read()
    touch(workdir)
    states["read_back"] = read()
    write_in_small_pages(workdir, users, width)
    states["small_pages"] = read()
    shutil.rmtree(workdir)
    print(json.dumps({"users": users, "width": width, "batch": batch, "index_s": round(indexed, 1), **states}))


if __name__ == "__main__":
    tyro.cli(main)
