"""Times what `e2p prefixes` and `e2p export --format peft` take in front of a Llama of 100 million random parameters.

    python benchmarks/opening.py

The run is made once; each command then has a process of its own. Prints seconds, peak memory, and bytes
copied out of the backbone's files. PYTHONPATH says whose code is measured.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

COMMANDS = {"prefixes": ["prefixes"], "peft": ["export", "--format", "peft", "--user", "user-3"]}
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "head_dim": 64}
SIZES |= {"num_attention_heads": 12, "num_key_value_heads": 12}


def make(folder: Path) -> None:
    """A backbone, a table of 1,000 users and a run saved at step 0."""
    import jax.numpy as jnp
    import numpy as np
    from etils import epath
    from flax import nnx

    from e2p_jax.backbone import weights
    from e2p_jax.backbone.decoder import Decoder
    from e2p_jax.backbone.families import read_config
    from e2p_jax.config import BackboneConfig, Config, DataConfig, PrefixConfig
    from e2p_jax.train.checkpoint import Checkpoints
    from e2p_jax.train.run import claim_run
    from e2p_jax.train.setup import build_model, initial_state, read_inputs
    from e2p_jax.vectors.population import Population
    from e2p_jax.vectors.table import save_table

    skeleton = folder / "skeleton"
    skeleton.mkdir(parents=True)
    weights.copy_companions(weights.EMBEDDED, skeleton)
    values = json.loads((skeleton / "config.json").read_text())
    (skeleton / "config.json").write_text(json.dumps(values | SIZES))
    decoder = Decoder(read_config(skeleton), dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    weights.save(decoder, skeleton, folder / "backbone", jnp.dtype("float32"))
    vectors = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    save_table(folder / "table", [f"user-{n}" for n in range(1000)], vectors, name="made", version="1")
    config = Config(
        backbone=BackboneConfig(path=str(folder / "backbone")),
        data=DataConfig(embeddings=str(folder / "table"), seq_len=128),
        prefix=PrefixConfig("after_bos"),
    ).resolved()
    inputs = read_inputs(config)
    model = build_model(inputs, Population.of(vectors))
    claim_run(epath.Path(folder / "run"), config, inputs, model)
    state, frozen = initial_state(model, config.train)
    checkpoints = Checkpoints(folder / "run", config.train)
    checkpoints.save(state, frozen["projector"], {}, None)
    checkpoints.close()


def measure(folder: Path, command: str) -> None:
    from e2p_jax.backbone import tensor_files
    from e2p_jax.cli import main

    copied, reader = [0], tensor_files._slice

    def counted(*args):  # type: ignore[no-untyped-def]
        piece = reader(*args)
        copied[0] += piece.nbytes
        return piece

    tensor_files._slice = counted
    name, *options = COMMANDS[command]
    shutil.rmtree(folder / "out", ignore_errors=True)
    start = time.perf_counter()
    assert main([name, str(folder / "run"), "--out", str(folder / "out"), *options]) == 0
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{command}: {seconds:.1f} s, {peak:,.0f} MiB at most, {copied[0] / 2**20:,.1f} MiB of the backbone read")


def main(folder: Path | None = None, command: str | None = None) -> None:
    """
    Args:
      folder: Where the run is made, once, and opened. Default: a temporary directory.
      command: Only measure this one, `prefixes` or `peft`, in this process.
    """
    if folder and command:
        measure(folder, command)
        return
    place = folder or Path(tempfile.mkdtemp())
    if not (place / "run").exists():
        make(place)
    for each in COMMANDS:
        subprocess.run([sys.executable, __file__, "--folder", str(place), "--command", each], check=True)


if __name__ == "__main__":
    tyro.cli(main)
