"""The tables of docs/plan.md: shipped configs on their pods, and one config as the pod grows.

    pip install -r requirements-tpu.txt && python benchmarks/plans.py shipped|weak > table.md

No TPU is needed; a line takes about a minute on two CPU cores.
"""

import json
import subprocess
import sys
from typing import Any, Literal

import tyro

SHIPPED = [("llama_1b", "v5e:2x4"), ("llama_8b", "v5e:4x4"), ("llama_70b", "v5p:2x4x4")]
WEAK = ["2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]


def plan(config: str, topology: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "e2p_jax", "plan", config, "--topology", topology, "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout)


def size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f}"


def shipped() -> None:
    head = "config, pod, mesh, rows, step, arguments, temporary, peak, TFLOP, traffic, received, best step"
    print(f"| {head.replace(', ', ' | ')} |\n|" + "---|" * 12)
    for config, topology in SHIPPED:
        values = plan(config, topology, "--no-suggest")
        mesh = " ".join(f"{axis}={n}" for axis, n in values["mesh"].items() if n > 1)
        for name, step in values["steps"].items():
            seconds = step["best_seconds"]
            longest = max(step["seconds"], key=lambda part: step["seconds"][part])
            print(
                f"| {config} | {topology} | {mesh} | {values['rows']} | {name} | {size(step['arguments'])} | "
                f"{size(step['temporary'])} | {size(step['peak'])} of {size(values['device_memory'])} | "
                f"{step['flops'] / 1e12:.1f} | {size(step['traffic'])} | {size(step['collective_bytes'])} | "
                f"{1000 * seconds:,.0f} ms ({longest}) |",
                flush=True,
            )


def weak() -> None:
    print("| chips | arguments | temporary | received | of gathers | of sums |\n|" + "---|" * 6)
    for grid in WEAK:
        chips = 1
        for side in grid.split("x"):
            chips *= int(side)
        values = plan("llama_8b", f"v5e:{grid}", "--no-suggest", "--train.rows", str(chips))
        step = values["steps"]["train"]
        of = {kind: size(entry["bytes"]) for kind, entry in step["collectives"].items()}
        gathers = sum(step["collectives"].get(k, {"bytes": 0})["bytes"] for k in ("all-gather", "collective-permute"))
        print(
            f"| {chips} | {size(step['arguments'])} | {size(step['temporary'])} | {size(step['collective_bytes'])} | "
            f"{size(gathers)} | {of.get('all-reduce', '0.00')} |",
            flush=True,
        )


def main(table: tyro.conf.Positional[Literal["shipped", "weak"]] = "shipped") -> None:
    """Prints a table.

    Args:
      table: Shipped configs, or one config as the pod grows.
    """
    shipped() if table == "shipped" else weak()


if __name__ == "__main__":
    tyro.cli(main)
