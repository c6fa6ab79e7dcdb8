"""Another user in front, drawn several times, and the share of the persona's worth that the soft token carries."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2p_jax.config import Condition
from e2p_jax.data.conditions import other_users, user_vectors
from e2p_jax.datasets import synthetic
from e2p_jax.evaluate.evaluation import Evaluation, evaluate, render, share_text, worst_text
from e2p_jax.evaluate.measures import difference, interval, share_of
from e2p_jax.train.run import open_run
from e2p_jax.train.score import Scorer

CONDITIONS: tuple[Condition, ...] = ("none", "e2p", "shuffled", "text", "text+shuffled")


@pytest.fixture(scope="module")
def evaluation(learned_run: Path) -> Evaluation:
    run = open_run(learned_run)
    config = run.inputs.config.change(evaluate={"derangements": 3, "measures": ("ranking",), "candidates": 3})
    run = dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=config))
    return evaluate(run, [synthetic.record(user) for user in range(12)], "all", CONDITIONS)


def test_other_users_stand_in_front_of_the_same_targets(evaluation: Evaluation, learned_run: Path) -> None:
    """Of every derangement, as text and as vector, against scores of records whose context is the other's."""
    run, records = open_run(learned_run), evaluation.records
    encoder, context = run.inputs.encoder, {record.user_id: record.context for record in records}
    groups = {}
    for draw in range(3):
        theirs = [context[other] for other in other_users([r.user_id for r in records], draw)]
        spoken = [dataclasses.replace(r, context=c) for r, c in zip(records, theirs, strict=True)]
        vectors = user_vectors(records, "shuffled", run.inputs.table, run.population, draw)
        groups["text+shuffled", draw] = ([encoder.encode(r, "text") for r in spoken], vectors)
        groups["shuffled", draw] = ([encoder.encode(r, "e2p") for r in records], vectors)
    for (name, draw), nll in Scorer(run).nll(groups).items():
        scores = evaluation.scores[name]
        np.testing.assert_allclose(scores.drawn[draw], nll, rtol=1e-5, err_msg=f"{name} {draw}")
        np.testing.assert_array_equal(scores.targets, [e.is_target.sum() for e in groups[name, draw][0]])
    assert evaluation.dropped_messages > 0  # for the longest of the texts
    for name, drawn in {"none": 1, "e2p": 1, "text": 1, "shuffled": 3, "text+shuffled": 3}.items():
        assert evaluation.scores[name].drawn.shape == (drawn, 12)
        np.testing.assert_array_equal(evaluation.scores[name].targets, evaluation.scores["none"].targets)
    lines = [json.loads(line) for line in evaluation.per_example().splitlines()]
    assert [line["condition"] for line in lines] == [name for name in CONDITIONS for _ in range(12)]
    mean = np.mean([evaluation.scores["shuffled"].drawn[draw, 5] for draw in range(3)])
    assert lines[2 * 12 + 5]["nll"] == pytest.approx(mean) and lines[2 * 12 + 5]["user_id"] == records[5].user_id
    assert set(evaluation.scores["text+shuffled"].statistics) == set(evaluation.scores["text"].statistics)
    hits = [evaluation.scores[name].statistics["mrr"].sum(axis=0) for name in ("text", "text+shuffled")]
    assert hits[0][1] == hits[1][1] == 12 and hits[0][0] != hits[1][0]


USERS, DRAWS = 50, 4


def simulated(worth: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Statistics of 100 records of 50 users, of whom the first has many targets, and their owners."""
    rng = np.random.default_rng(0)
    owner, targets = np.arange(2 * USERS) // 2, rng.integers(10, 60, 2 * USERS)
    targets[:2] = 400
    level = rng.normal(3, 0.3, USERS)[owner]
    per_target = {
        "e2p": level - rng.normal(0.1, 0.1, USERS)[owner],
        "shuffled": level + rng.normal(0, 0.3, (DRAWS, 1)) + rng.normal(0, 0.1, (DRAWS, 2 * USERS)),
        "text": level - worth - rng.normal(0, 0.1, USERS)[owner],
        "text+shuffled": level + rng.normal(0, 0.1, (DRAWS, 2 * USERS)),
    }
    stacked = {c: np.stack(np.broadcast_arrays(v * targets, targets), axis=-1) for c, v in per_target.items()}
    return stacked, owner


def test_share_and_intervals_agree_with_plain_numpy() -> None:
    statistics, owner = simulated(0.5)
    e2p, shuffled, text, other = statistics.values()
    users = [f"u{n}" for n in owner]
    found = share_of((e2p, shuffled), (text, other), users, 4000)
    apart = difference("nll_per_target", e2p, shuffled, users, 4000)

    rng, drawn = np.random.default_rng(5), []
    rows = np.arange(2 * USERS).reshape(USERS, 2)

    def nats(statistics: np.ndarray, people: np.ndarray, draws: np.ndarray) -> float:
        chosen = statistics[draws] if statistics.ndim == 3 else statistics[None]
        nll, targets = chosen[:, rows[people].ravel()].sum(axis=1).mean(axis=0)
        return float(nll / targets)

    def gains(people: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
        own, others, spelled, strange = (nats(s, people, draws) for s in (e2p, shuffled, text, other))
        return others - own, strange - spelled, (others - own) / (strange - spelled)

    for _ in range(4000):
        drawn.append(gains(rng.integers(0, USERS, USERS), rng.integers(0, DRAWS, DRAWS)))
    expected = gains(np.arange(USERS), np.arange(DRAWS))
    for part, value, sample in zip(found, expected, np.transpose(drawn), strict=True):
        assert part is not None and part.value == pytest.approx(value)
        low, high = np.quantile(sample, [0.025, 0.975])
        assert part.low == pytest.approx(low, abs=0.06 * (high - low)), part
        assert part.high == pytest.approx(high, abs=0.06 * (high - low)), part
    assert (apart.mean, apart.low, apart.high) == pytest.approx((-found.gain[0], -found.gain[2], -found.gain[1]))


def test_the_spread_over_derangements_is_in_the_interval() -> None:
    targets = np.full(30, 20.0)
    nll = np.stack([np.broadcast_arrays(targets * level, targets) for level in (3.0, 3.1, 3.2, 3.3)]).swapaxes(1, 2)
    users = [f"u{n}" for n in range(30)]
    alike = interval("nll_per_target", nll.mean(axis=0), users, 500)
    apart = interval("nll_per_target", nll, users, 500)
    assert alike.value == apart.value == pytest.approx(3.15)
    assert alike.high - alike.low < 1e-9 and 0.15 < apart.high - apart.low < 0.25
    own = nll[0] * [0.9, 1]
    shared = share_of((own, nll), (own, nll), users, 500).share
    assert shared is not None and shared == pytest.approx((1, 1, 1))  # both meet the same others in every sample


def test_no_share_of_what_is_not_told_from_nothing(evaluation: Evaluation) -> None:
    statistics, owner = simulated(0.0)
    e2p, shuffled, text, other = statistics.values()
    found = share_of((e2p, shuffled), (text, other), [f"u{n}" for n in owner], 500)
    assert found.whole.low < 0 < found.whole.high and found.share is None
    entry = {name: part and part._asdict() for name, part in found._asdict().items()}
    assert share_text(entry).startswith("no share: e2p is ")

    values: dict[str, Any] = evaluation.to_dict()
    shown = values["share"]
    apart = values["conditions"]["e2p"]["minus_shuffled"]
    assert shown["gain"] == pytest.approx({"value": -apart["mean"], "low": -apart["high"], "high": -apart["low"]})
    assert share_text(shown) in str(render(evaluation)[0].caption)
    assert set(values["beyond_none"]) == {"e2p", "shuffled"}
    worst = values["beyond_none"]["shuffled"]["worst"][0]
    row = [record.user_id for record in evaluation.records].index(worst["user_id"])  # one record each
    apart = evaluation.scores["shuffled"].drawn - evaluation.scores["none"].drawn
    assert worst["nats"] == pytest.approx((apart / evaluation.scores["none"].targets).max())
    assert worst["nats"] == pytest.approx((apart[:, row] / evaluation.scores["none"].targets[row]).max())
    said = f"shuffled {worst['nats']:+.4f} ('{worst['user_id']}'"
    assert said in str(render(evaluation)[0].caption) and said in worst_text(values["beyond_none"])

    without = {name: scores for name, scores in evaluation.scores.items() if name != "text"}
    assert dataclasses.replace(evaluation, scores=without).share() is None
