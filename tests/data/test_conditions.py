"""What every condition puts in front."""

import collections
import tracemalloc
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p_jax.config import Condition
from e2p_jax.data.conditions import FRONTS, draws, other_users, spelled_out, user_vectors
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import UserTable


@given(
    users=st.lists(st.integers(0, 12).map(str), min_size=2).filter(lambda u: len(set(u)) > 1), draw=st.integers(0, 99)
)
def test_others_are_a_derangement_by_user(users: list[str], draw: int) -> None:
    others = other_users(users, draw)
    assert len(others) == len(users)
    assert all(user != other for user, other in zip(users, others, strict=True))
    by_user = collections.defaultdict(set)
    for user, other in zip(users, others, strict=True):
        by_user[user].add(other)
    assert all(len(given_to) == 1 for given_to in by_user.values())  # the same stranger in every record of a user
    assert {other for (other,) in by_user.values()} == set(users)  # everyone is a stranger to one user
    assert others == other_users(users, draw)
    several = [other_users(users, n) for n in range(draws("shuffled", users, 4))]
    assert len(several) == min(4, len(set(users)) - 1)
    assert all(len(set(met)) == len(several) for met in zip(*several, strict=True))  # nobody meets anybody twice


def test_a_single_user_has_no_stranger() -> None:
    with pytest.raises(UserError, match="'shuffled' and 'text\\+shuffled' need at least two users"):
        other_users(["ann", "ann"], 0)
    assert draws("shuffled", ["ann"], 4) == draws("e2p", ["ann", "bob", "cat"], 4) == 1


def test_contexts_are_of_the_user_whose_vector_shuffled_gives() -> None:
    users = ["a", "b", "c", "a", "d", "a"]
    records = [Record(user, (f"{user}{n}",), (), source=f"r:{n}") for n, user in enumerate(users)]
    table = UserTable(["a", "b", "c", "d"], np.arange(4, dtype=np.float32)[:, None], "table")
    for draw in range(3):
        shown = list(spelled_out(records, "text+shuffled", draw))
        vectors = user_vectors(records, "shuffled", table, Population.standard(1), draw).gather()[:, 0]
        assert [record.context[0][0] for record in shown] == ["abcd"[int(n)] for n in vectors]
        assert [(r.user_id, r.source) for r in shown] == [(r.user_id, r.source) for r in records]
    theirs = list(spelled_out([r for r in records if r.user_id in "ab"], "text+shuffled"))
    assert [record.context[0] for record in theirs] == ["b1", "a0", "b1", "b1"]  # a user's next record, around
    assert list(spelled_out(records, "e2p+text")) == records


POPULATION = Population(np.array([2.0, -5.0], np.float32), np.array([0.5, 0.0], np.float32))


def test_vectors_by_condition() -> None:
    records = [Record(user, (), (), source=f"r:{n}") for n, user in enumerate(["a", "b", "c", "a"])]
    table = UserTable(["c", "a", "b"], np.array([[3.0, 3], [1, 1], [2, 2]], np.float32), "table")
    assert user_vectors(records, "e2p", table, POPULATION).gather()[:, 0].tolist() == [1, 2, 3, 1]
    shuffled = user_vectors(records, "shuffled", table, POPULATION).gather()[:, 0].tolist()
    assert sorted(shuffled[:3]) == [1, 2, 3] and shuffled[3] == shuffled[0]
    assert all(mine != other for mine, other in zip([1, 2, 3], shuffled, strict=False))
    known = UserTable(["c", "a"], np.array([[3.0, 3], [1, 1]], np.float32), "table", "null")
    for condition, firsts in (
        ("e2p", [1, -1, 3, 1]),
        ("shuffled", [3, -1, 1, 3]),
        ("extreme", [1000, -1, 3000, 1000]),
    ):
        vectors = user_vectors(records, condition, known, POPULATION).gather()
        assert np.nan_to_num(vectors[:, 0], nan=-1).tolist() == firsts
    assert not user_vectors(records, "text", table, POPULATION).gather().any()
    assert user_vectors(records, "none", None, POPULATION).gather().shape == (4, 2)
    with pytest.raises(UserError, match=r"data\.embeddings is not set; condition 'e2p' needs a table"):
        user_vectors(records, "e2p", None, POPULATION)
    with pytest.raises(UserError, match="r:1: user 'b' has no vector in table"):
        user_vectors(records, "e2p", UserTable(["a", "c"], np.eye(2, dtype=np.float32), "table"), POPULATION)


@pytest.mark.parametrize("condition", typing.get_args(Condition))
def test_vectors_stay_where_they_are(condition: Condition) -> None:
    """A conversation keeps a row number, not a vector; what is wrong with a vector is said before any is needed."""
    records = [Record(f"u{n % 50}", (), (), source="r") for n in range(2000)]
    table = UserTable([f"u{n}" for n in range(50)], np.ones((50, 2048), np.float16), "table")
    tracemalloc.start()
    try:
        vectors = user_vectors(records, condition, table, Population.standard(2048))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(vectors), vectors.width) == (2000, 2048) and vectors.gather([3, 1999]).shape == (2, 2048)
    assert held < 1e6  # all vectors: 16e6
    table.vectors[49] = np.nan
    if FRONTS[condition].reads_table:
        with pytest.raises(UserError, match=r"table: row 49 \(user 'u49'\) holds NaN"):
            user_vectors(records, condition, table, Population.standard(2048))


def test_every_condition_is_a_front() -> None:
    assert set(FRONTS) == set(typing.get_args(Condition))
    assert {name for name, front in FRONTS.items() if front.context} == {"text", "e2p+text", "text+shuffled"}
    assert {name for name, front in FRONTS.items() if front.vector is None} == {"none", "text", "text+shuffled"}


@pytest.mark.parametrize("condition", ["mean", "static", "zero", "noise"])
def test_controls_need_no_table(condition: Condition) -> None:
    records = [Record(user, (), (), source="") for user in [*"abcdefghij" * 40, "a"]]
    vectors = user_vectors(records, condition, None, POPULATION).gather()
    assert vectors.shape == (401, 2) and vectors.dtype == np.float32
    assert (vectors[0] == vectors[-1]).all()  # a user keeps its vector
    if condition == "noise":
        drawn = vectors[:10, 0]
        assert len(set(drawn)) == 10 and abs(drawn.mean() - 2) < 0.6 and 0.1 < drawn.std() < 1
        assert (vectors[:, 1] == -5).all()
    else:
        assert (vectors == (0 if condition == "zero" else POPULATION.mean)).all()
