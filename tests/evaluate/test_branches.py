"""Candidates behind a prompt that is read once, against each of them read with the prompt by itself."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import make_backbone, untrained_run

from e2p_jax.data.encode import Example
from e2p_jax.datasets import synthetic
from e2p_jax.evaluate import branches
from e2p_jax.evaluate.rank import candidate_examples
from e2p_jax.train.score import Scorer
from e2p_jax.vectors.source import Vectors

# Sliding windows, states of linear attention with a convolution in front, latents; slots at each place.
WAYS = [("gemma3_text", "before_reply", 3), ("qwen3_5_text", "in_chat", 1), ("deepseek_v3", "before_bos", 1)]


@pytest.mark.parametrize(("family", "placement", "num_tokens"), WAYS, ids=lambda value: str(value))
def test_of_any_family_and_placement(
    family: str, placement: str, num_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trunks of three lengths, one of them with a reply in it, and of one the branches in several rows."""
    monkeypatch.setattr(branches, "STEP", 32)
    monkeypatch.setattr(branches, "WIDEST", 32)
    run = untrained_run(tmp_path, make_backbone(tmp_path / "backbone", family, {}), placement, num_tokens, "mlp")
    said = ("yes!", "i like tea, and my two dogs like to run in the park.", "no", "i work at night.", "yes, yes!")
    groups = []
    for number, replies in {1: said, 2: said[:2], 3: said[1:2]}.items():
        record = dataclasses.replace(synthetic.record(number), candidates=replies, user_id=f"user-{number}")
        record = dataclasses.replace(record, messages=record.messages[-2 * number :])
        groups.append(candidate_examples({"e2p": record}, run.inputs.encoder)["e2p"])
    assert len({branches.Tree.of(group, num_tokens).trunk for group in groups}) == 3
    vectors = run.vectors([synthetic.record(number) for number in (1, 2, 3)], "e2p")
    found = branches.branch_nll(run, groups, vectors)
    every = Vectors(vectors.source, np.repeat(vectors.rows, [len(group) for group in groups]))
    alone = Scorer(run).nll({0: ([example for group in groups for example in group], every)})[0]
    assert len(np.unique(alone.round(3))) == len(alone)
    np.testing.assert_allclose(np.concatenate(found), alone, rtol=2e-5)


def test_a_trunk_ends_where_candidates_part() -> None:
    """At the first target or, where a text changed a token before it, there; a slot is no padding."""

    def example(tokens: list[int], first: int, slots: tuple[int, ...] = (1,)) -> Example:
        return Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= first, slots, "ann")

    a, b = example([5, 0, 6, 7, 8, 9], 4), example([5, 0, 6, 7, 8, 4, 9], 4)
    assert branches.Tree.of([a, b], 1) == ([a, b], 4)  # 8 is a target of both
    assert branches.Tree.of([a, example([5, 0, 6, 3, 9], 4)], 1).trunk == 3
    assert branches.Tree.of([a, example([5, 0, 6, 7, 9], 4, ())], 1).trunk == 1
    assert [branches.Tree.of([a, b], 1).branch_length(n) for n in (0, 1)] == [1, 2]
