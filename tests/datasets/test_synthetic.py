"""Generated personas: repeatable, apart by split, and impossible to answer for without knowing the user."""

import collections
import re

import numpy as np

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import check

USERS = range(300)


def test_records_are_sound_and_repeatable() -> None:
    for user in USERS[:20]:
        record = check(synthetic.record(user))
        assert record == synthetic.record(user)
        assert [m["role"] for m in record.messages] == ["user", "assistant"] * 5
        assert len(record.context) == 6
    assert synthetic.record(1) != synthetic.record(1, dialogue=1)
    assert synthetic.record(1).context == synthetic.record(1, dialogue=1).context


def test_splits_hold_different_users() -> None:
    ranges = (synthetic.TRAIN, synthetic.VALIDATION, synthetic.PRETRAINING)
    assert len(set().union(*ranges)) == sum(map(len, ranges))
    for split, users in (("train", synthetic.TRAIN), ("validation", synthetic.VALIDATION)):
        assert [record.user_id for record in synthetic.records(split)] == [f"user-{u}" for u in users]
    assert synthetic.records("test") == []


def test_replies_name_the_users_own_values() -> None:
    for user in USERS:
        record, values = synthetic.record(user), synthetic.traits(user)
        for value, sentence in zip(values.values(), record.context, strict=True):
            assert re.search(rf"\b{value}\b", sentence)
        replies = [m["content"] for m in record.messages if m["role"] == "assistant"][1:]
        named = [{v for v in values.values() if re.search(rf"\b{v}\b", reply)} for reply in replies]
        assert all(named), replies


def test_questions_do_not_give_the_answer_away() -> None:
    """The same question gets as many answers as its topic has values, none of them common."""
    answers = collections.defaultdict(collections.Counter)
    for user in synthetic.TRAIN:
        values = synthetic.traits(user)
        for topic, value in values.items():
            answers[topic][value] += 1
    assert answers.keys() == synthetic.TOPICS.keys()
    for topic, counts in answers.items():
        assert set(counts) == set(synthetic.TOPICS[topic][0].split())
        assert max(counts.values()) < 2 * sum(counts.values()) / len(counts)


def test_vectors_carry_the_traits_linearly() -> None:
    """Least squares from vectors of some users finds the values of others; from shuffled vectors it does not."""
    every = sorted({(t, v) for t in synthetic.TOPICS for v in synthetic.TOPICS[t][0].split()})
    mine = [set(synthetic.traits(user).items()) for user in range(1200)]
    has = np.array([[item in values for item in every] for values in mine], float)
    vectors = np.stack([synthetic.vector(u) for u in range(1200)])
    assert vectors.dtype == np.float32 and vectors.shape == (1200, synthetic.WIDTH)

    def found(x: np.ndarray) -> float:
        """Share of the last 200 users' six values among the six highest scores; chance is 6 of 148."""
        scores = x[1000:] @ np.linalg.lstsq(x[:1000], has[:1000], rcond=None)[0]
        top = np.argsort(-scores, axis=1)[:, :6]
        return float(np.take_along_axis(has[1000:], top, axis=1).mean())

    assert found(vectors) > 0.8
    assert found(np.random.default_rng(0).permutation(vectors)) < 0.1
