"""Measures the cost of a prefix beside nothing and beside a text prompt: in one process, turn by turn, medians."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from e2p_jax.config import Condition
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.generate import generate_tokens
from e2p_jax.options import Sampling
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.partition import split
from e2p_jax.train.run import Run

NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one prompt at a time."""

    condition: str
    prompt_tokens: float  # mean over the records, slots included, padding not
    first_token_ms: float  # median
    tokens_per_second: float  # after the first, median


def serving_cost(run: Run, records: Sequence[Record], conditions: Sequence[Condition], repeats: int = 15) -> list[Cost]:
    """Times the generation of one reply to the records' prompt of median length.

    Prompts are padded to a multiple of 64 tokens, as `e2p generate` pads them; compilation is not counted.
    """
    encoder = run.inputs.encoder
    asked = [dataclasses.replace(record, messages=record.messages[:-1]) for record in records]
    prompts = {c: [encoder.encode_prompt(record, c) for record in asked] for c in conditions}
    lengths = {c: [len(prompt.tokens) for prompt in prompts[c]] for c in conditions}
    middle = int(np.argsort([sum(lengths[c][n] for c in conditions) for n in range(len(asked))])[len(asked) // 2])
    vectors = {c: run.vectors(records, c).gather([middle]) for c in conditions}

    def seconds(condition: Condition, new_tokens: int) -> float:
        start = time.perf_counter()
        generate_tokens(
            run.model.graph,
            run.model.params,
            [prompts[condition][middle]],
            vectors[condition],
            sampling=Sampling(max_new_tokens=new_tokens),
            stops=(),
            pad=encoder.pad_id,
            num_tokens=encoder.num_tokens,
        )
        return time.perf_counter() - start

    times: dict[Condition, list[tuple[float, float]]] = {c: [] for c in conditions}
    for turn in range(repeats + 1):  # the first one compiles
        for condition in conditions:
            pair = seconds(condition, 1), seconds(condition, 1 + NEW_TOKENS)
            if turn:
                times[condition].append(pair)
    return [
        Cost(
            c,
            float(np.mean(lengths[c])),
            1000 * statistics.median(first for first, _ in times[c]),
            NEW_TOKENS / max(statistics.median(whole - first for first, whole in times[c]), 1e-9),
        )
        for c in conditions
    ]


@dataclasses.dataclass(frozen=True)
class Training:
    """The cost of a run's training."""

    trainable: int  # parameters
    frozen: int
    seconds: float  # of its steps at their median speed, without evaluation and compilation


def training_cost(run: Run) -> Training:
    """From the run's parameters and the speed in its metrics.jsonl."""
    train = run.inputs.config.train
    lines = read_metrics(run.directory / "metrics.jsonl")
    speeds = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    tokens = train.steps * train.rows * run.inputs.config.data.seq_len
    counts = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in split(run.model.params, run.model.mask)]
    return Training(counts[0], counts[1], tokens / statistics.median(speeds) if speeds else float("nan"))


def bytes_per_user(run: Run, records: Sequence[Record]) -> dict[str, float]:
    """Counts what is kept for a user: the vector as in the table, the soft tokens in bfloat16, the context as UTF-8
    (mean over the records).
    """
    width = run.model.embedding_width
    item = run.inputs.table.vectors.dtype.itemsize if run.inputs.table else 4
    return {
        "vector": float(width * item),
        "soft tokens": float(run.inputs.config.projector.num_tokens * run.inputs.decoder.hidden_size * 2),
        "context as text": float(np.mean([len("\n".join(record.context).encode()) for record in records])),
    }
