"""What the prefix of a trained run costs in serving, beside nothing in front and the context as text.

    python benchmarks/cost.py runs/compare-quickstart/e2p [RUN ...]

What `e2p report` measures, with more repeats: turn by turn in one process, medians, for the prompt of median length.
"""

from pathlib import Path

import tyro

from e2p_jax.config import Condition
from e2p_jax.evaluate.cost import bytes_per_user, serving_cost, training_cost
from e2p_jax.evaluate.evaluation import read_splits
from e2p_jax.train.run import open_run

CONDITIONS: tuple[Condition, ...] = ("none", "e2p", "text", "e2p+text")


def main(runs: tyro.conf.Positional[tuple[Path, ...]], /, repeats: int = 41) -> None:
    for path in runs:
        run = open_run(path)
        data = run.inputs.config.data
        records = read_splits(data, data.eval_splits)[data.eval_splits[0]]
        trained = training_cost(run)
        print(f"{path}: {trained.trainable:,} parameters trained in {trained.seconds:.0f} s, {trained.frozen:,} frozen")
        print(", ".join(f"{name} {size:.0f} bytes" for name, size in bytes_per_user(run, records).items()) + " a user")
        print("| in front | prompt tokens, mean | first token, ms | tokens/s after it |\n|---|---|---|---|")
        for cost in serving_cost(run, records, CONDITIONS, repeats):
            cells = f"{cost.prompt_tokens:.1f} | {cost.first_token_ms:.2f} | {cost.tokens_per_second:.0f}"
            print(f"| {cost.condition} | {cells} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
