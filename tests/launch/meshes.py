"""Trains one small run on meshes, in as many processes as it was started: meshes.py CONFIG.json OUT MESH..."""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

from e2p_jax.config import Config, MeshConfig, from_json
from e2p_jax.parallel.distributed import Processes, session
from e2p_jax.train.loop import train

MESHES = {
    "data": MeshConfig(data=4),
    "fsdp": MeshConfig(data=1, fsdp=4),
    "data-tensor": MeshConfig(data=2, tensor=2),
    "fsdp-tensor": MeshConfig(data=1, fsdp=2, tensor=2),
}


def train_each(config: Config, out: Path, names: Iterable[str] = MESHES) -> None:
    for name in names:
        train(dataclasses.replace(config, mesh=MESHES[name]), out / name)


if __name__ == "__main__":
    with session(Processes()):
        stored, out, *names = sys.argv[1:]
        train_each(from_json(Path(stored).read_text(), Path(stored)), Path(out), names)
