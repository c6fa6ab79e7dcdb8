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

from e2p_jax.config import Config, from_json
from e2p_jax.data import pipeline
from e2p_jax.parallel import distributed
from e2p_jax.parallel.distributed import Preempted, Processes, session
from e2p_jax.train import loop


def train_until(config: Config, run: Path, step: int) -> None:
    """Appends `{row of the batch: digest}` a step to `RUN.PROCESS.jsonl`; stops as SIGTERM would make it."""

    def digests(batch: dict[str, Any], mesh: Any, rows: int) -> Any:
        held = {
            int(row): hashlib.sha256(batch["tokens"][n].tobytes() + batch["user_embeddings"][n].tobytes()).hexdigest()
            for n, row in enumerate(pipeline.local_rows(mesh, rows))
        }
        with run.with_suffix(f".{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(held) + "\n")
        return pipeline.to_devices(batch, mesh, rows)

    @contextlib.contextmanager
    def stop(first: int) -> Iterator[Callable[[int], bool]]:
        yield lambda number: number == step

    with mock.patch.object(loop, "to_devices", digests), mock.patch.object(distributed, "preemption", stop):
        loop.train(config, run)


if __name__ == "__main__":
    with session(Processes()), contextlib.suppress(Preempted):
        train_until(from_json(Path(sys.argv[1]).read_text(), Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
