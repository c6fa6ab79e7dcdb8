"""How long until a command does something: help, imports, and the first step of training, cold and with compiled steps.

    python benchmarks/startup.py --workdir /tmp/startup

Every measurement is a fresh process. `seconds` are by the wall clock; `cpu` is the processor time of the process and
its threads, which a busy machine disturbs less. `first step` is `e2p train quickstart --train.steps 1`
without evaluation of conditions: cold with an empty compilation cache, then with what that run left there.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measure
import rich.console
import rich.table
import tyro

E2P = [sys.executable, "-m", "e2p_jax"]
ONE_STEP = ["--train.steps", "1", "--train.warmup_steps", "0", "--train.eval_every", "1"]
ONE_STEP += ["--evaluate.conditions", "--evaluate.prompts"]  # none


def once(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(seconds, processor seconds) of one process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(workdir: Path, repeats: int = 3, json_out: Path | None = None) -> None:
    """Measures.

    Args:
      workdir: Empty or new directory for runs and the cache; removed at the end.
      repeats: Of each measurement; the medians are shown.
      json_out: File for the figures.
    """
    workdir.mkdir(parents=True)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir / "cache")}

    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    def train(number: int) -> list[str]:
        return [*E2P, "train", "quickstart", "--workdir", str(workdir / f"run{number}"), *ONE_STEP]

    rows: list[dict[str, Any]] = []

    def add(name: str, figures: list[tuple[float, float]]) -> None:
        seconds, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        rows.append({"name": name, "seconds": seconds, "cpu": cpu, "runs": len(figures)})

    for name, command in {
        "python": python("pass"),
        "import jax, flax": python("import jax, flax"),
        "import e2p_jax": python("import e2p_jax"),
        "import all that training needs": python("import e2p_jax.train.loop"),
        "e2p --help": [*E2P, "--help"],
        "e2p train quickstart --help": [*E2P, "train", "quickstart", "--help"],
    }.items():
        add(name, [once(command, {}) for _ in range(repeats)])
    add("first step, nothing compiled before", [once(train(0), cache)])
    add("first step, compiled before", [once(train(1 + number), cache) for number in range(repeats)])
    shutil.rmtree(workdir)
    table = rich.table.Table("", "seconds", "cpu seconds", title="start-up")
    for row in rows:
        table.add_row(row["name"], f"{row['seconds']:.2f}", f"{row['cpu']:.2f}")
    rich.console.Console(width=100).print(table)
    measure.write_json(json_out, {"rows": rows})


if __name__ == "__main__":
    tyro.cli(main)
