"""One of two processes that load, save and restore a backbone together: two_backbones.py PORT PROCESS HF FLAX OUT."""

import sys
from pathlib import Path

import jax.numpy as jnp

from e2p_jax.backbone.weights import load, save
from e2p_jax.config import MeshConfig
from e2p_jax.parallel.distributed import Processes, session
from e2p_jax.parallel.mesh import make_mesh, param_sharding

if __name__ == "__main__":
    port, process, *places = sys.argv[1:]
    hf, flax, out = map(Path, places)
    with session(Processes(f"127.0.0.1:{port}", 2, int(process), 120)):
        mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
        for form in (hf, flax):
            decoder = load(
                form, dtype=jnp.dtype("float32"), sharding=lambda path, shape: param_sharding(mesh, path, shape)
            )
            save(decoder, hf, out / form.name, jnp.dtype("float32"))
