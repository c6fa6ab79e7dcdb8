"""Trains one small run on meshes and lets it reply, in as many processes as it was started: meshes.py CONFIG.json OUT
MESH...
"""

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import jax

from e2p_jax.config import Config, MeshConfig, from_json
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.generate import generate_tokens
from e2p_jax.options import Sampling
from e2p_jax.parallel.distributed import Processes, is_first, session
from e2p_jax.train.loop import train_model

MESHES = {  # data=4 is in test_faults.py and test_host_counts.py
    "fsdp": MeshConfig(data=1, fsdp=4),
    "data-tensor": MeshConfig(data=2, tensor=2),
    "fsdp-tensor": MeshConfig(data=1, fsdp=2, tensor=2),
}


def train_each(config: Config, out: Path, names: Iterable[str] = MESHES) -> None:
    for name in names:
        run = train_model(dataclasses.replace(config, mesh=MESHES[name]), out / name)
        if "tensor" not in name:
            continue  # the other two have each axis, and few compilations are enough
        records = [Record(f"user-{n}", (), ({"role": "user", "content": "any " * (n + 1)},)) for n in range(3)]
        encoder, model = run.inputs.encoder, run.model
        with jax.set_mesh(model.mesh):
            replies, _ = generate_tokens(
                model.graph,
                model.params,
                [encoder.encode_prompt(record, "e2p") for record in records],
                run.vectors(records, "e2p").gather(),
                sampling=Sampling(max_new_tokens=6, temperature=1.0),
                stops=(),
                pad=encoder.pad_id,
                num_tokens=encoder.num_tokens,
            )
        if is_first():
            (out / name / "replies.json").write_text(json.dumps(replies))


if __name__ == "__main__":
    with session(Processes()):
        stored, out, *names = sys.argv[1:]
        train_each(from_json(Path(stored).read_text(), Path(stored)), Path(out), names)
