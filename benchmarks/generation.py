"""What a soft token costs when a reply begins, beside nothing in front and the text it stands for; decoding beside HF.

    python benchmarks/generation.py                      # 41M parameters, a prompt of 512 tokens, CPU

Time to the first token: the prompt alone, with one soft token, and with `--text` tokens of persona in front. All are
padded as `e2p generate` pads them, so that what is measured is what is served. Then whole replies, ours and
transformers' `generate` on the same weights, greedy, which must choose the same tokens.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import models
import numpy as np
import torch
import tyro
from flax import nnx

from e2p_jax.backbone import weights
from e2p_jax.config import MeshConfig
from e2p_jax.data.encode import Example
from e2p_jax.evaluate.generate import generate_tokens
from e2p_jax.options import Sampling
from e2p_jax.parallel.mesh import make_mesh, param_sharding
from e2p_jax.prefix import mlp
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.prefix.projector import Projector

WIDTH = 384


def prompt(rng: np.random.Generator, length: int, slot: bool) -> Example:
    """Random tokens, one of them the slot where there is one."""
    tokens = rng.integers(10, 4000, length).astype(np.int32)
    return Example(tokens, np.zeros(length, bool), (0,) if slot else (), "")


def main(
    shape: models.Shape = "41m",
    length: int = 512,
    text: int = 64,
    new_tokens: int = 64,
    repeats: int = 7,
    clock: measure.Clock = "wall",
    json_out: Path | None = None,
) -> None:
    """Measures.

    Args:
      shape: Of the random Llama.
      length: Tokens of the prompt.
      text: Tokens of the persona spelled out.
      new_tokens: Of a whole reply.
      repeats: Rounds.
      clock: wall, or cpu: this process's processor time, for a busy machine (run it under `taskset -c 0`).
      json_out: File for the figures.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    mesh = make_mesh(MeshConfig())
    with tempfile.TemporaryDirectory() as name:
        torch_model: Any = models.write_model(shape, Path(name), dtype, device)
        decoder = weights.load(
            Path(name),
            dtype=jnp.dtype("bfloat16" if on_gpu else "float32"),
            sharding=lambda path, shape: param_sharding(mesh, path, shape),
        )
    projector = Projector(
        mlp.Settings(num_tokens=1, hidden_size=512, dropout=0.0),
        embedding_width=WIDTH,
        model_width=decoder.config.hidden_size,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(PrefixModel(decoder, projector))
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1, WIDTH)).astype(np.float32)

    def reply(example: Example, count: int) -> list[int]:
        how = {"sampling": Sampling(max_new_tokens=count), "stops": (), "pad": 0, "num_tokens": 1}
        return generate_tokens(graph, params, [example], vectors, **how)[0][0]

    fronts = {
        "no prefix": prompt(rng, length, False),
        "soft token": prompt(rng, length + 1, True),
        f"text of {text} tokens": prompt(rng, length + text, False),
    }
    firsts = [measure.Contender(name, lambda e=example: reply(e, 1), 1.0) for name, example in fronts.items()]
    measure.take_turns(firsts, repeats, clock)
    title = f"{shape}, prompt of {length} tokens, {device}"
    figures = [measure.report(f"{title}: first tokens", "replies", firsts[1], firsts)]

    example = fronts["no prefix"]
    ids = torch.tensor(example.tokens[None].astype(np.int64), device=device)

    def theirs() -> list[int]:
        out = torch_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        return out[0, length:].tolist()

    same = sum(a == b for a, b in zip(reply(example, new_tokens), theirs(), strict=True))
    print(f"{same} of {new_tokens} tokens are those that transformers chooses")
    whole = [
        measure.Contender("e2p_jax", lambda: reply(example, new_tokens), new_tokens),
        measure.Contender("transformers generate", theirs, new_tokens),
    ]
    measure.take_turns(whole, repeats, clock)
    figures.append(measure.report(f"{title}: a reply of {new_tokens}", "tokens", whole[0], whole))
    measure.write_json(json_out, {"tables": figures, "backend": jax.default_backend()})


if __name__ == "__main__":
    tyro.cli(main)
