"""Start-up and throughput of the data pipeline on one core: prints one line of JSON for each row length.

    python benchmarks/loader.py --data data/persona_chat/self_original/1.0.0 --workdir /tmp/loader
    python benchmarks/loader.py --users 1000000 --lengths 512 --workdir /tmp/loader
    python benchmarks/loader.py --users 10000000 --no-encode --lengths 512 --workdir /tmp/loader

Two fresh processes start on the same data, the first with an empty cache, the second with a full one; each is held to
one core, reads what a run reads before it trains, and then makes batches. Generated users say one conversation each and
have a table of vectors. With `--no-encode` each says one short exchange, in whose place stand made-up tokens, 63 in the
mean: template and tokenizer, most of the time of a first start, are left out, and nothing else. Told: seconds to start
and conversations; memory before anything was read, after, and at most, in megabytes: the process's own (private) and
with the mapped pages of cache and table (resident); what the start added to the private part, in bytes a conversation;
the share of the rows that is filled; tokens a second in batches, by the wall clock and by processor time (fairer on a
machine that others use).
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import tyro
from vectors import write_table

ROWS, WIDTH = 32, 128
HELD_OUT = 200  # generated users, half of them in `validation`, half in `selection`
DIALOGUES = 10_000  # different ones, said in turn


def make_records(path: Path, users: int, encode: bool) -> None:
    """Generated dialogues, one a line and user."""
    from e2p_jax.datasets import synthetic

    said = [json.dumps(synthetic.record(number).messages) for number in range(min(users, DIALOGUES))]
    if not encode:
        said = [json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])]
    with path.open("w", encoding="utf-8") as file:
        for user in range(users):
            split = "train" if user < users - HELD_OUT else ("validation", "selection")[user % 2]
            messages = said[user % len(said)]
            file.write(f'{{"user_id": "user-{user}", "split": "{split}", "messages": {messages}}}\n')


def leave_out_encoding() -> None:
    """Made-up tokens, of the lengths of a thousand kinds, in place of what the encoder would make of a record."""
    from e2p_jax.data.encode import Encoder, Example, Fitted

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.0, 0.5, 1000).astype(int), 12, 400)
    tokens = [rng.integers(0, 500, length, dtype=np.int32) for length in lengths]
    is_target = [np.arange(length) >= length // 2 for length in lengths]

    def fit(self, record, conditions):
        kind = int(record.user_id.removeprefix("user-")) % len(tokens)
        example = Example(tokens[kind], is_target[kind], (0,), record.user_id, record.source)
        return Fitted(record, dict.fromkeys(conditions, example), 0)

    Encoder.fit = fit


def backbone(workdir: Path, positions: int) -> Path:
    """The embedded backbone's tokenizer with a config that allows longer rows."""
    from e2p_jax.backbone.weights import EMBEDDED

    out = workdir / "backbone"
    if not out.exists():
        shutil.copytree(EMBEDDED, out)
        settings = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": positions}))
    return out


def memory() -> dict[str, int]:
    """Megabytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("Vm", "Rss"))}


class Peak(threading.Thread):
    """The most private memory, looked at every 50 ms: the system keeps a peak of the resident alone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, memory()["RssAnon"])
            time.sleep(0.05)


def measure(data: str, table: str | None, directory: Path, cache: Path, seq_len: int, steps: int) -> dict[str, float]:
    """In a process of its own."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from e2p_jax.config import BackboneConfig, Config, DataConfig, MeshConfig
    from e2p_jax.data.pipeline import train_iterator
    from e2p_jax.parallel.mesh import make_mesh
    from e2p_jax.train.loop import read_data
    from e2p_jax.train.setup import read_inputs

    generated = {"embeddings": table, "dev_split": "selection"} if table else {"condition": "none"}
    config = Config(
        backbone=BackboneConfig(path=str(directory)),
        data=DataConfig(path=data, cache=str(cache), seq_len=seq_len, **generated),
    )
    inputs = read_inputs(config)
    before, peak = memory()["RssAnon"], Peak()
    peak.start()
    clock = time.perf_counter(), time.process_time()
    dataset = read_data(inputs).train
    started, processor = time.perf_counter() - clock[0], time.process_time() - clock[1]
    after = memory()["RssAnon"]
    clock = time.perf_counter(), time.process_time()
    dataset.digest()
    digest = time.process_time() - clock[1]
    iterator = train_iterator(dataset, make_mesh(MeshConfig()), batch_rows=ROWS, steps=steps + 10, seed=0)
    for _ in range(10):  # the threads and their queue
        next(iterator)
    clock = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(iterator)
    wall, cpu = time.perf_counter() - clock[0], time.process_time() - clock[1]
    held, count = memory(), len(dataset.examples)
    return {
        "conversations": count,
        "start_s": round(started, 2),
        "start_cpu_s": round(processor, 2),
        "digest_cpu_s": round(digest, 2),
        "full": round(dataset.efficiency, 4),
        "tokens_per_s": round(steps * ROWS * seq_len / wall),
        "tokens_per_cpu_s": round(steps * ROWS * seq_len / cpu),
        "private_before_mb": before,
        "private_started_mb": after,
        "private_mb": held["RssAnon"],
        "private_peak_mb": peak.most,
        "bytes_a_conversation": round((after - before) * 2**20 / count),
        "peak_bytes_a_conversation": round((peak.most - before) * 2**20 / count),
        "resident_mb": held["VmRSS"],
        "peak_resident_mb": held["VmHWM"],
    }


def main(
    workdir: Path,
    data: str | None = None,
    users: int = 10_000,
    lengths: tuple[int, ...] = (512, 1024, 2048),
    steps: int = 200,
    encode: bool = True,
    reader: bool = False,
) -> None:
    """Measures the pipeline.

    Args:
      workdir: New directory; removed at the end.
      data: What `data.path` takes. Default: generated users.
      users: How many are generated where no data is given.
      lengths: T, of the rows.
      steps: Batches of 32 rows made for the throughput.
      encode: Make tokens of what generated users say; else made-up ones.
      reader: Only measure one process, on what is in `workdir`.
    """
    if reader:
        if not encode:
            leave_out_encoding()
        place, table = (data, None) if data else (str(workdir / "records.jsonl"), str(workdir / "table"))
        print(json.dumps(measure(place, table, backbone(workdir, 1 << 16), workdir / "cache", lengths[0], steps)))
        return
    workdir.mkdir(parents=True)
    backbone(workdir, 1 << 16)
    if data is None:
        make_records(workdir / "records.jsonl", users, encode)
        write_table(workdir / "table", users, WIDTH)
    for length in lengths:
        flags = ["--reader", "--workdir", str(workdir), "--lengths", str(length), "--steps", str(steps)]
        flags += ["--encode" if encode else "--no-encode"]
        command = [sys.executable, __file__, *flags, *(["--data", data] if data else [])]
        first, second = (
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(2)
        )
        print(json.dumps({"seq_len": length, "first": first, "second": second}), flush=True)
    shutil.rmtree(workdir)


if __name__ == "__main__":
    tyro.cli(main)
