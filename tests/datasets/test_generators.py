"""The synthetic releases: in the true formats, and the user's vector settles the answer."""

import numpy as np
import pytest

from benchmarks.releases import interactions as plays
from benchmarks.releases import pens as news
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.interactions.layouts import read_log
from e2p_jax.datasets.interactions.split import Options, records, split
from e2p_jax.datasets.prepare import prepare
from e2p_jax.datasets.prepared import load_records, load_table


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plays") / "release"
    plays.write(directory, users=300, items=500)
    return directory


def hits(scores: np.ndarray) -> float:
    """Hit@10 of the first of the columns; ties count against it."""
    return float(((scores >= scores[:, :1]).sum(axis=1) <= 10).mean())


def test_a_listeners_vector_ranks_the_next_title_and_popularity_does_not(log):
    options = Options(candidates="uniform")
    table, _ = split(read_log(log, BadRecords()), options)
    asked = list(records(table, options, "test"))
    vectors = load_table(str(log / "vectors.npz")).lookup([r.user_id for r in asked], [r.user_id for r in asked])
    subject = dict(plays.catalogue(500))
    of = np.array([subject[title] for title in table.titles])
    # What each subject is worth to a listener, by least squares from vectors to what they played before.
    history = table.of("history")
    played = np.zeros((len(table.user_ids), len(plays.SUBJECTS)))
    np.add.at(played, (history.users, of[history.items]), 1.0)
    everyone = load_table(str(log / "vectors.npz")).lookup(table.user_ids, table.user_ids)
    weights, *_ = np.linalg.lstsq(everyone, played, rcond=None)
    items = np.array([[table.titles.index(title) for title in r.candidates] for r in asked])
    by_vector = hits(np.take_along_axis(vectors @ weights, of[items], axis=1))
    popular = hits(np.bincount(history.items, minlength=len(table.titles))[items].astype(np.float64))
    assert by_vector > 0.6 and popular < 0.35, (by_vector, popular)


def test_a_readers_vector_settles_the_headline(tmp_path):
    news.write(tmp_path / "release", users=100, articles=300)
    directory = str(prepare("pens", tmp_path / "release", tmp_path / "data"))
    table = load_table(str(tmp_path / "release" / "vectors.npz"))
    names = [*news.TOPICS, *news.STYLES]
    directions = np.random.default_rng([0, 2]).normal(size=(len(names), news.WIDTH))
    things = {}
    for number in range(300):
        pair = news.article(number)
        things[news.body(pair, number)] = pair
    for name, count in (("train", 90), ("validation", 10), ("test", 103)):
        made = load_records(directory, name)
        assert len({record.user_id for record in made}) == count
        right = []
        users = [record.user_id for record in made]
        for record, vector in zip(made, table.lookup(users, users), strict=True):
            likes = dict(zip(names, directions @ vector, strict=True))
            pair = things[record.messages[0]["content"].split("\n\n")[1]]
            style = max(news.STYLES, key=likes.__getitem__)
            right.append(record.messages[1]["content"] == style.format(max(pair, key=lambda t: likes[t.topic]).value))
        assert np.mean(right) > 0.75, (name, np.mean(right))  # eight headlines are open without the vector
        assert all(record.context and (record.references != ()) == (name == "test") for record in made)


def test_the_same_seed_gives_the_same_files(tmp_path):
    for module, sizes in ((plays, {"users": 20, "items": 50}), (news, {"users": 20, "articles": 60})):
        name = module.__name__.split(".")[-1]
        for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
            module.write(tmp_path / name / folder, **sizes, seed=seed)
        one, again, other = (sorted((tmp_path / name / folder).iterdir()) for folder in ("one", "again", "other"))
        for a, b, c in zip(one, again, other, strict=True):
            assert a.read_bytes() == b.read_bytes() != c.read_bytes()
