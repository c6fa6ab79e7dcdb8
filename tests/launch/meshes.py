"""Trains one small run on four meshes, in as many processes as it was started: meshes.py CONFIG.json OUT."""

import dataclasses
import sys
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


def train_all(config: Config, out: Path) -> None:
    for name, mesh in MESHES.items():
        train(dataclasses.replace(config, mesh=mesh), out / name)


if __name__ == "__main__":
    with session(Processes()):
        train_all(from_json(Path(sys.argv[1]).read_text(), Path(sys.argv[1])), Path(sys.argv[2]))
