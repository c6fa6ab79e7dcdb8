"""Trains to a step and leaves, writing down which rows this process put into each batch: CONFIG.json RUN STEP."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from e2p_jax.config import Config, from_json
from e2p_jax.data import pipeline
from e2p_jax.parallel import distributed
from e2p_jax.parallel.distributed import Preempted, Processes, session
from e2p_jax.train import loop


def train_until(config: Config, run: Path, step: int) -> None:
    """Appends `{row of the batch: digest}` a step to `RUN.PROCESS.jsonl`; stops as SIGTERM would make it."""

    def digests(iterator: Any, mesh: Any, rows: int) -> Iterator[Any]:
        for batch, position in pipeline.on_devices(iterator, mesh, rows):
            held, shards = {}, (batch["tokens"].addressable_shards, batch["user_embeddings"].addressable_shards)
            for here in zip(*shards, strict=True):
                for row, *parts in zip(range(rows)[here[0].index[0]], *(np.asarray(s.data) for s in here), strict=True):
                    held[row] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
            with run.with_suffix(f".{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps(held) + "\n")
            yield batch, position

    @contextlib.contextmanager
    def stop(first: int) -> Iterator[Callable[[int], bool]]:
        yield lambda number: number == step

    with mock.patch.object(loop, "on_devices", digests), mock.patch.object(distributed, "preemption", stop):
        loop.train(config, run)


if __name__ == "__main__":
    with session(Processes()), contextlib.suppress(Preempted):
        train_until(from_json(Path(sys.argv[1]).read_text(), Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
