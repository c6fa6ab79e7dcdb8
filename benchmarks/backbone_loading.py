"""Memory and speed of loading a backbone, on a made-up sharded checkpoint: prints one line of JSON.

    python benchmarks/backbone_loading.py --workdir /tmp/loading --layers 22 --devices 4

The checkpoint is a Llama of width 2048 in bfloat16 (2.2 GB at 22 layers), placed onto CPU devices along fsdp. Their
memory is host memory, so `host_peak_bytes` is the peak of the process's anonymous memory during its first load
(compilation included), sampled from another process, less that before and less the bytes placed. Pages of the mapped
files are the page cache's, which drops them where memory is short, and are not counted.

Timed, medians of `repeats`: reading the files into one small buffer, reading them into new memory of their size,
loading, and the fingerprint; cold after the files were dropped from the page cache, warm after they were read. `cpu_s`
is processor time, which says more than the clock where others use the machine.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro

SAMPLER = """
import sys, time
path, peak, before = f"/proc/{sys.argv[1]}/status", 0, None
def anonymous():
    with open(path) as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
first = anonymous()
print(flush=True)
import threading
threading.Thread(target=lambda: (sys.stdin.read(), print(peak - first, flush=True), __import__("os")._exit(0))).start()
while True:
    peak = max(peak, anonymous())
    time.sleep(0.001)
"""


def make_checkpoint(directory: Path, layers: int) -> int:
    """Writes config.json and shards of random bits; returns the bytes of the largest tensor."""
    from e2p_jax.backbone.families import read_config
    from e2p_jax.backbone.tensor_files import parts
    from e2p_jax.backbone.weights import abstract, parameters
    from e2p_jax.tensors import write_tensors

    directory.mkdir(parents=True)
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4}
    config |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    decoder = read_config(directory)
    shapes = {k: v.shape for k, v in parameters(abstract(decoder, dtype=np.dtype(ml_dtypes.bfloat16))).items()}
    held = parts(decoder, shapes)
    largest = max(int(np.prod(shapes[path][len(part.stack) :])) for path, part in held.items())
    noise = np.random.default_rng(0).standard_normal(largest, np.float32).astype(ml_dtypes.bfloat16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, part in held.items():
            shape = shapes[path][len(part.stack) :]
            for name in part.names().values():
                yield name, noise[: int(np.prod(shape))].reshape(shape)

    write_tensors(directory, tensors())
    return largest * 2


def drop(files: list[Path]) -> None:
    """From the page cache; nothing may have them mapped."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path], buffers: list[bytearray]) -> None:
    """Each file into its buffer, from the start again where that is full."""
    for path, buffer in zip(files, buffers, strict=True):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main(workdir: Path, layers: int = 22, devices: int = 4, repeats: int = 3) -> None:
    """Measures one checkpoint.

    Args:
      workdir: Directory to make and remove again.
      layers: 22 are 2.2 GB.
      devices: CPU devices to split it over.
      repeats: Of everything that is timed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XDG_CACHE_HOME"] = str(workdir / "cache")
    import jax
    import jax.numpy as jnp

    from e2p_jax.backbone.tensor_files import Checkpoint, fingerprint
    from e2p_jax.backbone.weights import load, parameters
    from e2p_jax.config import MeshConfig
    from e2p_jax.parallel.mesh import make_mesh, param_sharding

    directory = workdir / "model"
    largest = make_checkpoint(directory, layers)
    files = sorted(directory.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices))

    def load_all() -> int:
        decoder = load(
            directory, dtype=jnp.dtype("bfloat16"), sharding=lambda path, shape: param_sharding(mesh, path, shape)
        )
        arrays = jax.block_until_ready(list(parameters(decoder).values()))
        return sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)

    sampler = subprocess.Popen(
        [sys.executable, "-c", SAMPLER, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert sampler.stdin is not None and sampler.stdout is not None
    sampler.stdout.readline()
    placed = load_all()
    sampler.stdin.close()
    peak = int(sampler.stdout.readline())

    actions: dict[str, Callable[[], object]] = {
        "read": lambda: read(files, [bytearray(1 << 24)] * len(files)),
        "read_into_memory": lambda: read(files, [bytearray(path.stat().st_size) for path in files]),
        "load": load_all,
        "fingerprint": lambda: fingerprint(Checkpoint(directory).tensors),
    }
    clock, processor = ({f"{name}_{state}": [] for state in ("cold", "warm") for name in actions} for _ in range(2))
    for _ in range(repeats):
        for key in clock:
            name, _, state = key.rpartition("_")
            drop(files) if state == "cold" else actions["read"]()
            started, used = time.perf_counter(), time.process_time()
            actions[name]()
            clock[key].append(time.perf_counter() - started)
            processor[key].append(time.process_time() - used)
    Checkpoint(directory).fingerprint()
    started = time.perf_counter()
    Checkpoint(directory).fingerprint()
    figures = {
        "bytes": size,
        "devices": devices,
        "largest_tensor_bytes": largest,
        "placed_bytes": placed,
        "host_peak_bytes": peak - placed,
        "host_peak_in_largest_tensors": round((peak - placed) / largest, 2),
        "gb_per_s": {key: round(size / statistics.median(seconds) / 1e9, 2) for key, seconds in clock.items()},
        "cpu_s": {key: round(statistics.median(seconds), 2) for key, seconds in processor.items()},
        "kept_fingerprint_s": round(time.perf_counter() - started, 4),
        "cores": os.cpu_count(),
    }
    print(json.dumps(figures))
    shutil.rmtree(workdir)


if __name__ == "__main__":
    tyro.cli(main)
