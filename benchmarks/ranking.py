"""Candidates behind a prompt that is read once, beside each of them read with the prompt by itself.

    python benchmarks/ranking.py --data data/persona_chat/self_original/1.0.0 --split validation
    python benchmarks/ranking.py --data data/interactions/time/1.0.0 --split test --backbone DIR --records 4

A projector that was never trained stands in front of the backbone; vectors are random. Both ways must give the same
numbers before anything is timed.
"""

from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np
import tyro

from e2p_jax.config import BackboneConfig, Condition, Config, DataConfig, TrainConfig
from e2p_jax.datasets.prepared import load_records
from e2p_jax.evaluate import branches
from e2p_jax.evaluate.rank import candidate_examples, with_candidates
from e2p_jax.train.run import Run
from e2p_jax.train.score import Scorer, pack_groups
from e2p_jax.train.setup import build_model, read_inputs
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.source import Vectors

WIDTH = 64


def main(
    data: str,
    split: str,
    backbone: str = "embedded",
    records: int = 8,
    candidates: int = 20,
    condition: Condition = "e2p",
    seq_len: int = 512,
    repeats: int = 3,
    clock: measure.Clock = "wall",
    json_out: Path | None = None,
) -> None:
    """Measures.

    Args:
      data: As data.path.
      split: Of it.
      backbone: As backbone.path.
      records: So many, evenly spaced over the split.
      candidates: Of records that bring none.
      condition: What stands in front: e2p, text, none.
      seq_len: As data.seq_len.
      repeats: Rounds.
      clock: wall, or cpu: this process's processor time, for a busy machine (run it under `taskset -c 0`).
      json_out: File for the figures.
    """
    config = Config(
        backbone=BackboneConfig(path=backbone),
        data=DataConfig(path=data, seq_len=seq_len),
        train=TrainConfig(rows=4, trainable=("projector/**",)),
    )
    inputs = read_inputs(config)
    rng = np.random.default_rng(0)
    every = with_candidates(list(load_records(data, split)), candidates)
    asked = [every[n] for n in np.linspace(0, len(every) - 1, records).round().astype(int)]
    vectors = Vectors.of(rng.normal(size=(records, WIDTH)).astype(np.float32))
    run = Run(Path(), 0, inputs, build_model(inputs, Population.of(vectors.gather())))
    groups = [candidate_examples({condition: record}, inputs.encoder)[condition] for record in asked]
    trees = [branches.Tree.of(group, inputs.encoder.num_tokens) for group in groups]
    flat = [example for group in groups for example in group]
    repeated = Vectors(vectors.source, np.repeat(vectors.rows, [len(group) for group in groups]))
    packed = pack_groups({0: (flat, repeated)}, inputs.encoder)[0]
    scorer = Scorer(run)

    positions: list[int] = []
    scored = branches._nll

    def counted(params: Any, given: Any, trunk: branches.Part, behind: branches.Part, *rest: Any, **more: Any) -> Any:
        positions.append(trunk.tokens.size + behind.tokens.size)
        return scored(params, given, trunk, behind, *rest, **more)

    branches._nll = counted  # type: ignore[assignment]
    together, alone = np.concatenate(branches.branch_nll(run, groups, vectors)), scorer.example_nll(packed)
    branches._nll = scored
    np.testing.assert_allclose(together, alone, rtol=1e-3 if jax.default_backend() != "cpu" else 1e-4)
    apart = float(np.abs(together / alone - 1).max())
    whole = sum(len(example.tokens) for example in flat)
    shared = sum(tree.trunk + sum(map(tree.branch_length, range(len(tree.examples)))) for tree in trees)
    padded = len(packed.rows) * packed.budget.tokens, sum(positions)
    print(f"{len(flat)} candidates of {records} records; the same to {apart:.1e}")
    print(f"tokens: {whole:,} one by one, {shared:,} with prompts read once, {whole / shared:.2f}x fewer")
    print(f"with padding: {padded[0]:,} and {padded[1]:,}, {padded[0] / padded[1]:.2f}x fewer")
    contenders = [
        measure.Contender("prompts read once", lambda: branches.branch_nll(run, groups, vectors), len(flat)),
        measure.Contender("one by one", lambda: scorer.example_nll(packed), len(flat)),
    ]
    measure.take_turns(contenders, repeats, clock)
    table = measure.report(f"{data}, {split}, {condition}", "candidates", contenders[0], contenders)
    counts = {"whole": whole, "shared": shared, "padded": padded[0], "padded_shared": padded[1], "apart": apart}
    measure.write_json(json_out, {"tokens": counts, "tables": [table], "backend": jax.default_backend()})


if __name__ == "__main__":
    tyro.cli(main)
