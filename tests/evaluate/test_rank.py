"""Ranking by likelihood: packed together against one by one, and the measures of a rank by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.config import BackboneConfig, Condition, Config, DataConfig
from e2p_jax.datasets import synthetic
from e2p_jax.errors import UserError
from e2p_jax.evaluate import rank as ranking
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.prefix import mlp
from e2p_jax.train.run import Run
from e2p_jax.train.score import Scorer
from e2p_jax.train.setup import build_model, read_inputs
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.source import Vectors

USERS = range(8)


@pytest.fixture(scope="module")
def run(tiny_backbone: Path) -> Run:
    """An untrained projector in front of a random backbone: likelihoods differ by user all the same."""
    config = Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(embeddings="synthetic", seq_len=128),
        projector=mlp.Settings(hidden_size=16, init_scale=3.0),
    )
    inputs = read_inputs(config)
    return Run(
        Path(), 0, inputs, build_model(inputs, Population.of(np.stack([synthetic.vector(user) for user in range(50)])))
    )


@pytest.fixture(scope="module")
def scorer(run: Run) -> Scorer:
    return Scorer(run)


def test_ranks():
    scores = np.array([[1.0, 2, 3], [2, 1, 3], [3, 2, 1], [1, 1, 1], [2, 1, np.nan]])
    assert ranking.ranks(scores).tolist() == [1, 2, 3, 2, 2]


def test_measures_of_a_rank():
    statistics = ranking.rank_statistics(np.array([1.0, 3.0, 11.0, 0.0]))
    assert statistics["hits@1"].tolist() == [[1, 1], [0, 1], [0, 1], [0, 0]]
    assert statistics["mrr"][:, 0].tolist() == pytest.approx([1, 1 / 3, 1 / 11, 0])
    assert statistics["ndcg@10"][:, 0].tolist() == pytest.approx([1, 1 / 2, 0, 0])  # log2(1 + 3) is 2


def test_candidates_are_scored_as_replies_one_by_one(run: Run, scorer: Scorer):
    """Packed together, the last reply alone counts: its NLL is that of the conversation less that of what is before."""
    records = ranking.with_candidates([synthetic.record(user) for user in USERS], 5)
    assert all(len(r.candidates) == 5 and r.candidates[0] == r.messages[-1]["content"] for r in records)
    assert all(len(set(r.candidates)) == 5 for r in records)
    found = ranking.candidate_nll(run, records, ["e2p", "none"])
    encoder = run.inputs.encoder
    for number, condition in [(0, "e2p"), (3, "none")]:
        record = records[number]
        vectors = Vectors.of(np.stack([synthetic.vector(number)] * 2))
        per_token = []
        for text in record.candidates:
            spoken = (*record.messages[:-1], {"role": "assistant", "content": text})
            whole = encoder.encode(dataclasses.replace(record, messages=spoken), condition)
            before = encoder.encode(dataclasses.replace(record, messages=record.messages[:-2]), condition)
            nll = scorer.nll({0: ([whole, before], vectors)})[0]
            per_token.append((nll[0] - nll[1]) / (whole.is_target.sum() - before.is_target.sum()))
        np.testing.assert_allclose(found[condition][number], per_token, rtol=1e-4)
    assert (np.abs(found["e2p"] - found["none"]) > 1e-3).any()


def test_too_long_with_one_candidate_loses_the_same_turns_with_all(run: Run):
    record, encoder = synthetic.record(0), run.inputs.encoder
    record = dataclasses.replace(record, candidates=(record.messages[-1]["content"], "word " * 60))
    short, long = ranking.candidate_examples({"e2p": record}, encoder)["e2p"]
    assert len(long.tokens) <= 128
    assert short.tokens[~short.is_target].tolist() == long.tokens[~long.is_target].tolist()
    alone = dataclasses.replace(record, candidates=record.candidates[:1])
    assert len(ranking.candidate_examples({"e2p": alone}, encoder)["e2p"][0].tokens) > len(short.tokens)


def test_the_users_own_vector_is_ranked_among_others(run: Run, scorer: Scorer):
    records = [synthetic.record(user) for user in USERS]
    found = ranking.rank_users(run, scorer, records, "e2p", len(USERS))
    example = run.inputs.encoder.encode(records[2], "e2p")
    vectors = Vectors.of(np.stack([synthetic.vector(user) for user in USERS]))
    nll = scorer.nll({0: ([example] * len(USERS), vectors)})[0]
    assert found[2] == 1 + (nll < nll[2]).sum()
    with pytest.raises(UserError, match=r"evaluate\.candidates=9: the split has 8 users"):
        ranking.rank_users(run, scorer, records, "e2p", 9)


def test_too_few_replies_to_draw_from():
    with pytest.raises(UserError, match=r"other replies, evaluate\.candidates=20 needs more"):
        ranking.with_candidates([synthetic.record(user) for user in range(3)], 20)


def test_others_are_what_other_users_said():
    """A reply of the user's own stands beside the true one only if somebody else gave it, too."""
    said = {"a": ["x", "y", "both"], "b": ["both", "p", "q"], "c": ["r", "x"]}
    records = [
        dataclasses.replace(synthetic.record(0), user_id=user, messages=({"role": "assistant", "content": text},))
        for user, texts in said.items()
        for text in texts
    ]
    others = [
        set().union(*(said[user] for user in said if user != r.user_id)) - {r.messages[0]["content"]} for r in records
    ]
    drawn = ranking.with_candidates(records, 4)
    for row, (record, pool) in enumerate(zip(drawn, others, strict=True)):
        chosen = np.random.default_rng([0, row]).choice(len(pool), 3, replace=False)
        assert record.candidates[1:] == tuple(sorted(pool)[i] for i in chosen)


def test_the_true_one_comes_first():
    """As the published dialogues have it last, another's rank would be taken for the reply's own."""
    records = [synthetic.record(user) for user in range(3)]
    true, wrong = records[0].messages[-1]["content"], ("something else.", "nothing.")
    (kept,) = ranking.with_candidates([dataclasses.replace(records[0], candidates=(true, *wrong))], 20)
    assert kept.candidates == (true, *wrong)
    for candidates, said in (((*wrong, true), "'something else.', is not the last reply"), ((true,), "the only one")):
        with pytest.raises(UserError, match=said):
            ranking.with_candidates([dataclasses.replace(records[0], candidates=candidates)], 20)


@pytest.mark.parametrize(("measure", "said"), [("ranking", "needs more"), ("users", "has 2 users only")])
def test_too_few_to_rank_among_is_said_before_anything_is_scored(
    run: Run, capsys: pytest.CaptureFixture[str], measure: str, said: str
):
    config = run.inputs.config.change(evaluate={"measures": (measure,)})
    asked = dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=config))
    with pytest.raises(UserError, match=said):
        evaluate(asked, [synthetic.record(user) for user in range(2)], "few", ["e2p"])
    assert "evaluate few" not in capsys.readouterr().err


@pytest.mark.parametrize("condition", ["none", "text"])
def test_a_reply_with_nothing_before_it_is_ranked(run: Run, condition: Condition):
    alone = ({"role": "assistant", "content": "i ski."},)
    record = dataclasses.replace(synthetic.record(0), messages=alone, candidates=("i ski.", "no."))
    found = ranking.candidate_examples({condition: record}, run.inputs.encoder)[condition]
    assert all(example.is_target.any() for example in found)
