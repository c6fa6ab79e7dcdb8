"""Intervals, tests and values against SciPy, sacreBLEU and plain arithmetic."""

import dataclasses
import json
import math

import numpy as np
import pytest
import sacrebleu
import scipy.stats

from e2p_jax.config import Config
from e2p_jax.data.conditions import user_vectors
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.evaluation import notes_on
from e2p_jax.evaluate.measures import (
    MEASURES,
    Difference,
    bootstrap,
    difference,
    interval,
    interval_text,
    p_text,
    permutation_p,
    text_statistics,
    value_text,
)
from e2p_jax.train.score import Scores
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import UserTable


def scores(nll: np.ndarray, targets: np.ndarray) -> Scores:
    return Scores(nll.astype(np.float64)[None], targets, targets * 2, targets * 9)


def nll_difference(
    ours: np.ndarray, base: np.ndarray, targets: np.ndarray, users: list[str], samples: int
) -> Difference:
    a, b = (scores(nll, targets).statistics["nll_per_target"] for nll in (ours, base))
    return difference("nll_per_target", a, b, users, samples)


def test_interval_agrees_with_scipy():
    rng = np.random.default_rng(0)
    targets = rng.integers(10, 60, 300)
    base = targets * rng.normal(4, 0.3, 300)
    ours = base - targets * rng.normal(0.02, 0.1, 300)
    result = nll_difference(ours, base, targets, [f"u{i}" for i in range(300)], 5000)

    def ratio(difference: np.ndarray, size: np.ndarray, axis: int) -> np.ndarray:
        return difference.sum(axis) / size.sum(axis)

    expected = scipy.stats.bootstrap(
        (ours - base, targets), ratio, paired=True, n_resamples=5000, method="percentile", rng=1
    ).confidence_interval
    assert result.mean == pytest.approx((ours - base).sum() / targets.sum())
    assert result.low == pytest.approx(expected.low, abs=1e-3)
    assert result.high == pytest.approx(expected.high, abs=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.012, 0.1])
def test_paired_test_agrees_with_scipy(shift: float):
    rng = np.random.default_rng(1)
    targets = rng.integers(10, 60, 120).astype(float)
    base = targets * rng.normal(4, 0.3, 120)
    ours = base - targets * rng.normal(shift, 0.1, 120)
    a, b = np.stack([ours, targets], 1), np.stack([base, targets], 1)
    p, least = permutation_p(a, b, MEASURES["nll_per_target"].value, 9999)
    expected = scipy.stats.permutation_test(
        (ours, base), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples", vectorized=True, rng=2
    ).pvalue
    assert p == pytest.approx(expected, abs=0.02) and 0 < p <= 1
    assert (p < 0.001) == (shift == 0.1) and least == 1e-4


def test_few_users_are_permuted_in_every_way():
    """As SciPy does, to the last digit; and no p is shown below what that can give."""
    rng = np.random.default_rng(3)
    targets, base = rng.integers(10, 60, 9).astype(float), rng.normal(100, 9, 9)
    ours = base - rng.normal(4, 5, 9)
    a, b = np.stack([ours, targets], 1), np.stack([base, targets], 1)
    found = permutation_p(a, b, MEASURES["nll_per_target"].value, 1000)
    expected = scipy.stats.permutation_test(
        (ours, base), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples", vectorized=True, n_resamples=512
    ).pvalue
    assert found == (pytest.approx(expected, abs=1e-12), 2 / 512) and 2 / 512 < expected < 0.1
    assert [p_text(p, 1 / 2001) for p in (1 / 2001, 0.00149, 0.25)] == ["<= 0.0005", "0.0015", "0.25"]
    assert [p_text(p, 2 / 16) for p in (2 / 16, 0.25)] == ["<= 0.13", "0.25"]


def test_users_are_resampled_whole():
    """A user's dialogues move together: one odd user among four widens the interval far beyond its records' share."""
    nll, targets = np.zeros(400), np.full(400, 10)
    odd = np.where(np.arange(400) < 100, -10.0, 0.0)
    users = [f"u{i // 100}" for i in range(400)]
    clustered = nll_difference(odd, nll, targets, users, 4000)
    alone = nll_difference(odd, nll, targets, [f"u{i}" for i in range(400)], 4000)
    assert clustered.high == 0.0 and clustered.low < -0.7
    assert -0.32 < alone.low < alone.high < -0.18
    assert clustered.p == 1 and clustered.p_least == 2 / 16 and alone.p == alone.p_least == 1 / 4001


def test_likelihood_in_every_unit():
    s = Scores(np.array([[2.0, 4.0]]), np.array([3, 3]), np.array([1, 2]), np.array([5, 7]))
    assert s.word_perplexity == pytest.approx(math.exp(2.0)) and s.per_target == pytest.approx(1.0)
    values = {name: interval(name, stats, ["a", "b"], 50)[0] for name, stats in s.statistics.items()}
    expected = {"nll_per_target": 1.0, "word_perplexity": math.exp(2.0), "bits_per_byte": 6 / 12 / math.log(2)}
    assert values == pytest.approx(expected)


def test_blocks_of_a_bootstrap_are_one_bootstrap(monkeypatch: pytest.MonkeyPatch):
    sums = np.random.default_rng(0).normal(size=(3, 30, 2)) + 5
    value = MEASURES["nll_per_target"].value
    whole = bootstrap([sums], value, 100)
    monkeypatch.setattr("e2p_jax.evaluate.measures.MOST", 210)
    assert whole.shape == (100, 1)
    np.testing.assert_allclose(bootstrap([sums], value, 100), whole)


def test_corpus_bleu_from_its_statistics(talk_records: tuple[list[str], list[Record]]):
    """The value over all records, and over some of them, is sacreBLEU's own."""
    replies, records = talk_records
    truths = [record.messages[-1]["content"] for record in records]
    statistics = text_statistics(replies, records)["bleu"]
    for part in (slice(None), slice(1, 3)):
        expected = sacrebleu.corpus_bleu(replies[part], [truths[part]]).score
        assert MEASURES["bleu"].value(statistics[part].sum(axis=0)) == pytest.approx(expected)
    assert 5 < expected < 95


def test_text_without_spaces_has_a_perplexity_that_can_be_written():
    """A reply in Chinese is one word of hundreds of nats: floats end at 709."""
    s = Scores(np.array([[1200.0, 4000.0]]), np.array([120, 300]), np.array([1, 1]), np.array([200, 500]))
    entry = interval("word_perplexity", s.statistics["word_perplexity"], ["a", "b"], 50)._asdict()
    json.dumps(entry, allow_nan=False)
    assert len(value_text("word_perplexity", entry)) < 10 and len(interval_text("word_perplexity", entry)) < 25
    assert value_text("word_perplexity", {"value": 12345.678}) == "12345.68"
    apart = difference("word_perplexity", *[s.statistics["word_perplexity"]] * 2, ["a", "b"], 50)
    assert apart.mean == 0


TALK = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "i ski."})


def test_rows_that_are_not_what_they_promise_are_noted():
    one, bare = Record("ann", ("i ski.",), TALK), Record("bob", (), TALK)
    config, conditions = Config(), ("none", "e2p", "text", "text+shuffled")
    assert notes_on(config, [one, dataclasses.replace(one, user_id="cat")], conditions) == ()
    (note,) = notes_on(config, [one, bare], conditions)
    assert note.startswith("text, text+shuffled: 1 of 2 conversations have no `context`")
    assert notes_on(config, [one, bare], ("none", "e2p")) == ()
    (note,) = notes_on(config.change(data={"condition": "static"}), [one, bare], ("e2p", "shuffled", "static"))
    assert note == "e2p, shuffled: trained under data.condition=static, on no users' vectors"
    (note,) = notes_on(config, [one], ("none", "e2p"))
    assert note.startswith("one user alone")
    unanswered = [dataclasses.replace(r, messages=(*TALK, {"role": "user", "content": "bye"})) for r in (one, bare)]
    asked = config.change(evaluate={"measures": ("texts", "ranking")})
    (note,) = notes_on(asked, unanswered, ("e2p",))
    assert note.startswith("texts, ranking: not measured") and notes_on(asked, [one, bare], ("e2p",)) == ()
    (note,) = notes_on(config.change(data={"targets": "all"}), [one, bare], ("e2p",))
    assert note.startswith("data.targets=all: text in front is a target, too")
    vectors, conditions = np.array([[1.0], [2.0], [2.0], [3.0]], np.float32), ("e2p", "shuffled")
    asked = [dataclasses.replace(one, user_id=user) for user in "abcdef"]  # e and f have none
    table = UserTable(list("abcd"), vectors, "table", "null")
    others = user_vectors(asked, "shuffled", table, Population.standard(1)).gather()[:, 0]
    same = 2 + int((others[1:3] == 2).sum())
    (note,) = notes_on(config, asked, conditions, table)
    assert note.startswith(f"shuffled: in {same} of 6 conversations the other user's vector is the same")
    assert notes_on(config, [asked[0], asked[3]], conditions, table) == ()
    spoken = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "\u6211\u559c\u6b22\u6ed1\u96ea" * 8})
    (note,) = notes_on(config, [dataclasses.replace(r, messages=spoken) for r in (one, bare)], ("e2p",))
    assert note.startswith("PPL per word: a word of the replies has 120 bytes")
