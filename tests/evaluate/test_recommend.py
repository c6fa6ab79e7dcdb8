"""Recommenders without a language model, on a log small enough to work out by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.datasets.interactions.log import SPLITS, Interactions, load_interactions, save_interactions
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate import items
from e2p_jax.evaluate.evaluation import evaluate, render
from e2p_jax.evaluate.items import Question, is_interactions, named_titles, neighbours
from e2p_jax.evaluate.measures import MEASURES
from e2p_jax.train.run import open_run
from e2p_jax.vectors.catalogue import Catalogue
from e2p_jax.vectors.table import UserTable

# ann and bob like rock, cat and dan like jazz; what is asked for is in no known interaction of its user.
KNOWN = {"ann": "r1 r2 pop", "bob": "r1 r3 pop", "cat": "j1 j2 pop", "dan": "j1 j3 pop"}
ASKED = {"ann": "r3", "cat": "j3"}
TITLES = ["r1", "r2", "r3", "j1", "j2", "j3", "pop", "nobody's"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(user, title, "history") for user, mine in KNOWN.items() for title in mine.split()]
    rows += [(user, title, "test") for user, title in ASKED.items()]
    rows.sort(key=lambda row: list(KNOWN).index(row[0]))
    users, titles, splits = zip(*rows, strict=True)
    log = Interactions(
        list(KNOWN),
        [f"id-{title}" for title in TITLES],
        TITLES,
        np.array([list(KNOWN).index(user) for user in users], np.int32),
        np.array([TITLES.index(title) for title in titles], np.int32),
        np.ones(len(rows), np.float32),
        None,
        np.array([SPLITS.index(split) for split in splits], np.int8),
    )
    directory = tmp_path_factory.mktemp("log")
    save_interactions(directory, log)
    return directory


def records() -> list[Record]:
    question = {"role": "user", "content": "what next?"}
    wrong = {"ann": ("j2", "pop"), "cat": ("r2", "nobody's")}
    asked = {user: (question, {"role": "assistant", "content": title}) for user, title in ASKED.items()}
    return [Record(user, (), asked[user], (ASKED[user], *wrong[user])) for user in ASKED]


def test_ranks_by_hand(folder: Path):
    table = UserTable(list(KNOWN), np.array([[3.0, 1], [3, 1], [1, 3], [1, 3]], np.float32), "table")
    measured = Question(str(folder), records()).recommenders(table)
    found = {name: (1 / by_measure["mrr"][:, 0]).tolist() for name, by_measure in measured.items()}
    # What is asked for is not known: r3, j2, pop are had by 1, 1, 4 users; j3, r2, nobody's by 1, 1, 0. A tie counts
    # half against.
    assert found["popularity"] == [2.5, 1.5]
    assert found["item-kNN"] == [2, 1]
    assert found["vectors"] == [1, 1]
    # Least squares say that r3, j2, pop have 1/2, 0, 1 of ann; j3, r2, nobody's 1/2, 0, 0 of cat.
    assert found["vectors (dot product)"] == [2, 1]
    assert "vectors" not in Question(str(folder), records()).recommenders(None)


def test_what_is_recommended_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Only the first place counts here; of a tie the item with the lower number has it, whichever is asked for."""
    monkeypatch.setattr(items, "FIRST", 1)
    eve = Record("eve", (), records()[0].messages, ("nobody's", "j1"))  # of whom nothing is known
    found = Question(str(folder), [*records(), eve]).recommenders(None)
    popular = found["popularity"]
    # pop (4 users, r3 1), r2 (1, j3 1) and j1 (2, nobody's 0) of eight items.
    assert popular["popularity@10"].tolist() == [[4, 1], [1, 1], [2, 0]]
    assert popular["coverage@10"].tolist() == [[1, 8 / 3]] * 3
    assert popular["cold_hits@10"].tolist() == [[0, 0], [0, 0], [1, 1]] and popular["cold_mrr"][2].tolist() == [0.5, 1]
    # j1 is none of the cold items, so that nobody's is alone there.
    assert popular["cold_own_mrr"].tolist() == [[0, 0], [0, 0], [1, 1]]
    twice = Question(str(folder), [records()[0]] * 2).recommenders(None)["popularity"]
    assert twice["coverage@10"].tolist() == [[0.5, 4], [0.5, 4]] and "cold_mrr" not in twice
    assert MEASURES["coverage@10"].value(twice["coverage@10"].sum(axis=0)) == 100 / 8


def test_other_data_has_no_recommenders(folder: Path, tmp_path: Path):
    assert is_interactions(str(folder)) and not is_interactions(str(tmp_path)) and not is_interactions("synthetic")


def test_item_neighbours_by_hand(folder: Path):
    """Cosines of the items' columns of users, summed over the user's items."""
    known = load_interactions(folder).of("history")
    asked = [TITLES.index(title) for title in ("r3", "pop", "j2", "nobody's")]
    scores = neighbours(known)("ann")[asked]
    # To r1 (ann, bob), r2 (ann), pop (all): r3 is bob's alone, j2 cat's.
    expected = [0.5**0.5 + 1 / 2, 0.5**0.5 + 1 / 2 + 1, 1 / 2, 0]
    np.testing.assert_allclose(scores, expected)


def test_vectors_of_items_by_hand(folder: Path):
    """Cosines to the mean of the user's items, of which nobody need have had the one that is asked for."""
    vectors = {"r1": (3, 1), "r2": (3, -1), "r3": (2.5, 6), "j1": (-3, 1), "j2": (2, -1), "pop": (0, 0)}
    vectors["j3"] = (-7.5, -6)
    table = UserTable([f"id-{title}" for title in vectors], np.array([*vectors.values()], np.float32), "items", "null")
    asked = [dataclasses.replace(each, items=(f"id-{ASKED[each.user_id]}",)) for each in records()]
    found = Question(str(folder), asked, Catalogue(table, 7)).recommenders(None)["item vectors"]
    # Standardised, of spreads 3.65 and 3.30. ann's r1, r2 and pop come to a vector along the first: of her candidates
    # j2 is nearer than r3, which is longer, pop at a right angle. cat's j1, j2 and pop come to (-1, 0): j3, not r2.
    np.testing.assert_allclose(found["mrr"][:, 0], [1 / 2, 1])
    # What has no vector is last, behind what points away from the user.
    last = dataclasses.replace(asked[1], candidates=("nobody's", "r2", "j3"))
    found = Question(str(folder), [last], Catalogue(table, 7)).recommenders(None)["item vectors"]
    np.testing.assert_allclose(found["mrr"][:, 0], [1 / 3])


def test_items_are_ranked_by_hand(folder: Path):
    """Rows times queries; what the user had is left out of all items, and an item without a row comes last."""
    ids = [f"id-{title}" for title in TITLES if title != "nobody's"]
    table = UserTable(ids, np.eye(7, dtype=np.float32), "items", "null")
    asked = [dataclasses.replace(record, items=(f"id-{ASKED[record.user_id]}",)) for record in records()]
    catalogue = Catalogue(table, 7)
    question = Question(str(folder), asked, catalogue)
    queries = np.ones((2, 1), np.float32)
    rows = np.array([[9], [8], [3], [5], [4], [2], [1]], np.float32)  # r1 r2 r3 j1 j2 j3 pop
    found = question.of_head(queries, rows, catalogue.rows(question.ids))
    # ann is asked for r3 (3): of the candidates j2 (4) is above; of all she had r1, r2, pop, and j1, j2 are above.
    # cat is asked for j3 (2): r2 (8) is above, nobody's below; of all r1, r2, r3 are, and she had the others.
    np.testing.assert_allclose(found["item_mrr"][:, 0], [1 / 2, 1 / 2])
    np.testing.assert_allclose(found["all_mrr"][:, 0], [1 / 3, 1 / 4])
    others = question.recommenders(None)
    assert set(others) == {"popularity", "item-kNN", "item vectors"}
    assert {f"item_{name}".replace("item_all_", "all_") for name in others["popularity"]} == set(found)
    # Among all, r3 is had by one, and so are j1's two; j2, j3 by one; nobody's by none: behind j1, a tie with two.
    np.testing.assert_allclose(others["popularity"]["all_mrr"][0, 0], 1 / 3)
    with pytest.raises(UserError, match="'id-r9' is no item of"):
        Question(str(folder), [dataclasses.replace(asked[0], items=("id-r9",))], catalogue)


def test_titles_that_replies_name(folder: Path):
    """Case and punctuation aside; the user's are those known and those asked for."""
    asked = [records()[number] for number in (0, 0, 0, 1)]
    found = named_titles(str(folder), ["R3!", "Nobody's.", "r3 and pop", "pop"], asked)
    assert found["title"].tolist() == [[1, 1], [1, 1], [0, 1], [1, 1]]
    assert found["own_title"].tolist() == [[1, 1], [0, 1], [0, 1], [1, 1]]


def test_a_log_is_ranked_by_likelihood_and_by_recommenders(folder: Path, learned_run: Path, tmp_path: Path):
    """Among candidates the two are compared; over all items only those have scores who score without a model."""
    run = open_run(learned_run)
    config = run.inputs.config.change(data={"path": str(tmp_path)}, evaluate={"measures": ("ranking",)})
    run = dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=config))
    users = {user: f"user-{number}" for number, user in enumerate(KNOWN)}  # the run's
    save_interactions(tmp_path, dataclasses.replace(load_interactions(folder), user_ids=list(users.values())))
    asked = [
        dataclasses.replace(record, user_id=users[record.user_id], items=(f"id-{ASKED[record.user_id]}",))
        for record in records()
    ]
    evaluation = evaluate(run, asked, "test", ["e2p"])
    values = evaluation.to_dict()
    found, popular = values["conditions"]["e2p"]["measures"], values["recommenders"]["popularity"]
    assert found["coverage@10"]["value"] == pytest.approx(100 * 6 / 8)  # r3, j2, pop; j3, r2, nobody's
    assert found["popularity@10"]["value"] == pytest.approx((2 + 2 / 3) / 2) and "all_hits@10" not in found
    assert "e2p_minus" in popular["hits@10"] and "e2p_minus" not in popular["all_hits@10"]
    assert popular["all_mrr"]["low"] <= popular["all_mrr"]["value"] <= popular["all_mrr"]["high"]
    assert set(values["recommenders"]) == {"popularity", "item-kNN", "vectors", "vectors (dot product)"}
    assert "of all items MRR" in {str(cell) for cell in render(evaluation)[1].columns[0].cells}
