"""How long until a command does something: help, imports, and the first step of training, cold and with compiled steps.

    python benchmarks/startup.py --workdir /tmp/startup

Every measurement is a fresh process. `seconds` are by the wall clock; `cpu` is the processor time of the process and
its threads, which a busy machine disturbs less. `train one step` is `e2p train quickstart --train.steps 1` without
evaluation of conditions: cold with an empty compilation cache, then with what that run left there. A second table
breaks such a start down, up to the end of the first step.
"""

import json
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
import numpy as np
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


def break_down() -> dict[str, float]:
    """Seconds of each part of what `e2p train quickstart` does up to the end of its first step, in this process."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def done(part: str) -> None:
        nonlocal last
        seconds[part], last = time.perf_counter() - last, time.perf_counter()

    from e2p_jax.cli import set_environment
    from e2p_jax.config import load_config

    set_environment("train")
    config = load_config("quickstart")[1].resolved()
    done("command line and config")
    import jax
    import transformers.models.auto.tokenization_auto  # noqa: F401

    done("import jax, transformers (and torch, where it is installed)")
    from e2p_jax.data.pipeline import to_devices
    from e2p_jax.train import setup
    from e2p_jax.train.loop import read_data

    done("import the rest")
    inputs = setup.read_inputs(config)
    data = read_data(inputs)
    done("data: read, tokenise, pack")
    model = setup.build_model(inputs, data.population)
    state, frozen = setup.initial_state(model, config.train)
    done("backbone, projector, optimizer")
    with jax.set_mesh(model.mesh):
        batch = to_devices(data.train.batch(range(config.train.rows)), model.mesh, config.train.rows)
        lowered = setup.jit_train_step(model, config.train).lower(state, frozen, batch)
        done("trace the step")
        step = lowered.compile()
        done("compile it, or load it")
        jax.block_until_ready(step(state, frozen, batch))
    done("first step")
    return seconds


def main(workdir: Path, repeats: int = 3, json_out: Path | None = None, part: bool = False) -> None:
    """Measures.

    Args:
      workdir: Empty or new directory for runs and the cache; removed at the end.
      repeats: Of each measurement; the medians are shown.
      json_out: File for the figures.
      part: Only break down one start, in this process.
    """
    if part:
        print(json.dumps(break_down()))
        return
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
    add("train one step, score, save; nothing compiled before", [once(train(0), cache)])
    add("train one step, score, save; compiled before", [once(train(1 + number), cache) for number in range(repeats)])

    def parts(cache: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--part", "--workdir", str(workdir)]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(workdir / cache)}
        return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)

    cold = parts("another")
    warm = [parts("another") for _ in range(repeats)]
    shutil.rmtree(workdir)
    table = rich.table.Table("", "seconds", "cpu seconds", title="start-up")
    for row in rows:
        table.add_row(row["name"], f"{row['seconds']:.2f}", f"{row['cpu']:.2f}")
    rich.console.Console(width=100).print(table)
    table = rich.table.Table("", "cold", "compiled before", title="seconds up to the end of the first step")
    breakdown = {name: (cold[name], statistics.median(run[name] for run in warm)) for name in cold}
    for name, pair in {**breakdown, "together": np.sum(list(breakdown.values()), axis=0)}.items():
        table.add_row(name, *(f"{seconds:.2f}" for seconds in pair))
    rich.console.Console(width=100).print(table)
    measure.write_json(json_out, {"rows": rows, "breakdown": breakdown})


if __name__ == "__main__":
    tyro.cli(main)
