"""Interactions: published layouts, splits, candidates, and what is kept beside the records."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.interactions.layouts import Log, read_log
from e2p_jax.datasets.interactions.log import SPLITS, Interactions, load_interactions
from e2p_jax.datasets.interactions.split import Options, records, split
from e2p_jax.datasets.prepare import prepare
from e2p_jax.datasets.prepared import load_records
from e2p_jax.errors import UserError

MOVIE = "|01-Jan-1995||http://x|" + "|".join("0" * 19)
LAYOUTS: dict[str, dict[str, bytes]] = {
    "lastfm": {
        "user_artists.dat": b"userID\tartistID\tweight\r\n2\t51\t13883\r\n2\t52\t11690\r\n3\t51\t7\r\n",
        "artists.dat": 'id\tname\turl\tpictureURL\r\n51\t"Weird Al" Yankovic\thttp://a\thttp://b\r\n'
        "52\tBjörk\thttp://a\t\r\n53\tNobody\thttp://a\t\r\n".encode(),
    },
    "ml-100k": {
        "u.data": b"2\t51\t3\t881250949\n2\t52\t5\t891717742\n3\t51\t1\t878887116\n",
        "u.item": f"51|Die Brücke (1995){MOVIE}\n52|Big Bang, The (1996){MOVIE}\n".encode("latin-1"),
    },
    "ml-1m": {
        "ratings.dat": b"2::51::3::881250949\n2::52::5::891717742\n3::51::1::878887116\n",
        "movies.dat": '51::Die Brücke (1995)::Drama|War\n52::"Big" Bang (1996)::Comedy\n'.encode("latin-1"),
    },
    "ml-latest": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n2,51,3.5,881250949\n2,52,5.0,891717742\n3,51,0.5,878887116\n",
        "movies.csv": 'movieId,title,genres\n51,Die Brücke (1995),Drama\n52,"Bang, The ""Big"" (1996)",War\n'.encode(),
    },
    "lastfm-bare": {  # no headers, and an old Mac's line ends
        "user_artists.dat": b"2\t51\t13883\r2\t52\t11690\r3\t51\t7\r",
        "artists.dat": '51\t"Weird Al" Yankovic\thttp://a\thttp://b\r52\tBjörk\thttp://a\t'.encode(),
    },
    "recbole": {
        "some.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        b"2\t51\t3\t881250949\n2\t52\t5\t891717742\n3\t51\t1\t878887116\n",
        "some.item": b"item_id:token\tmovie_title:token_seq\tclass:token_seq\n51\tToy Story\tComedy\n52\tHeat\t\n",
    },
    "own-us": {
        "interactions.csv": b"user,item,weight,time\n2,51,3,12/4/1997 12:00:00 AM\n2,52,5,4/4/1998 7:29:02 PM\n"
        b"3,51,1,878887116\n",
    },
    "own": {  # saved by a spreadsheet: a byte order mark, CRLF, its columns in another order
        "interactions.tsv": b"\xef\xbb\xbftime\tuser\titem\tweight\r\n1997-12-04\t2\t51\t3\r\n"
        b"1998-04-04T19:29:02Z\t2\t52\t5\r\n\r\n878887116\t3\t51\t1\r\n",
        "items.tsv": 'item\ttitle\r\n51\t"One\ttab"\r\n52\tCafé  owner \r\n'.encode(),
    },
}
TITLES = {
    "lastfm": ['"Weird Al" Yankovic', "Björk"],
    "lastfm-bare": ['"Weird Al" Yankovic', "Björk"],
    "recbole": ["Toy Story", "Heat"],
    "own-us": ["51", "52"],
    "ml-100k": ["Die Brücke (1995)", "Big Bang, The (1996)"],
    "ml-1m": ["Die Brücke (1995)", '"Big" Bang (1996)'],
    "ml-latest": ["Die Brücke (1995)", 'Bang, The "Big" (1996)'],
    "own": ["One tab", "Café owner"],
}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_are_read_as_they_come(tmp_path, name):
    log = read_log(write(tmp_path, LAYOUTS[name]), BadRecords())
    assert (log.user_ids, log.item_ids, log.titles) == (["2", "3"], ["51", "52"], TITLES[name])
    assert (log.users.tolist(), log.items.tolist()) == ([0, 0, 1], [0, 1, 0])
    weights = {"lastfm": [13883, 11690, 7], "lastfm-bare": [13883, 11690, 7], "ml-latest": [3.5, 5, 0.5]}.get(
        name, [3, 5, 1]
    )
    assert log.weights.tolist() == weights
    if name.startswith("lastfm"):
        assert log.times is None
    else:
        first = 881193600 if name.startswith("own") else 881250949  # midnight UTC of a date
        assert log.times.tolist() == [first, 891718142 if name.startswith("own") else 891717742, 878887116]


def test_an_own_log_needs_neither_weights_nor_times_nor_titles(tmp_path):
    log = read_log(write(tmp_path, {"interactions.csv": b"item,user\nsong,ann\n"}), BadRecords())
    assert (log.user_ids, log.titles, log.weights.tolist(), log.times) == (["ann"], ["song"], [1], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratings.csv": b""}, r"ratings.csv: empty"),
        ({"ratings.csv": b"userId,movieId,timestamp\n"}, r"ratings.csv:1: the header lacks \['rating'\]; it has"),
        (
            {"ratings.csv": b"userId,userId,rating,timestamp\n"},
            r"ratings.csv:1: the header must name every column once",
        ),
        ({"ratings.csv": b"userId,movieId,rating,timestamp\n"}, r"ratings.csv: holds no interactions"),
        ({"ratings.csv": b"userId,movieId,rating,timestamp\n1,2,3\n"}, r"ratings.csv:2: 3 columns, expected 4"),
        ({"ratings.csv": b"userId,movieId,rating,timestamp\n1,2,x,4\n"}, r":2: column 'rating' is 'x', not a number"),
        ({"ratings.csv": b"userId,movieId,rating,timestamp\n1,2,nan,4\n"}, r":2: column 'rating' is 'nan'; it must be"),
        ({"ratings.csv": b"userId,movieId,rating,timestamp\n1,2,-1,4\n"}, r":2: column 'rating' is '-1'"),
        ({"ratings.csv": b"userId,movieId,rating,timestamp\n1,2,3,inf\n"}, r":2: column 'timestamp' is 'inf'"),
        (
            {"ratings.csv": b"userId,movieId,rating,timestamp\n1,2,3,2020-13-01\n"},
            r":2: column 'timestamp' is '2020-13",
        ),
        ({"ratings.csv": b"userId,movieId,rating,timestamp\n1, ,3,4\n"}, r":2: column 'movieId' is empty"),
        ({"movies.csv": b"movieId,title,genres\n1,\xe9,x\n"}, r"movies.csv:2: column 3: not utf-8 \(byte 0xe9\)"),
        ({"movies.csv": b"movieId,title,genres\n1,a,x\n1,b,x\n"}, r"movies.csv:3: item '1' is 'b' here and 'a' above"),
        (
            {"ratings.csv": b"userId,movieId,rating,timestamp\n1,2,3,13/11/2019 14:46\n"},
            r":2: column 'timestamp' is '13/11/2019 14:46'; write seconds, 2019-11-12T14:14:46 or 11/12/2019 2:",
        ),
        ({"u.data": b""}, r"holds u.data and ratings.csv; it must hold one of"),
    ],
)
def test_a_row_that_breaks_the_layout_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_log(write(tmp_path, LAYOUTS["ml-latest"] | changes), BadRecords())


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no interactions; it must hold one of user_artists.dat \(Last.fm 2k"):
        read_log(tmp_path, BadRecords())
    other = write(tmp_path / "mind", {"behaviors.tsv": b"x", "news.tsv": b"x"})
    with pytest.raises(
        UserError, match=r"behaviors.tsv: MIND's impressions are not read: write each click .*items.tsv"
    ):
        read_log(other, BadRecords())
    with pytest.raises(
        UserError, match=r"plays.parquet: Parquet is not read as a log: write interactions.csv .*write_csv"
    ):
        read_log(write(tmp_path / "columns", {"plays.parquet": b"x"}), BadRecords())
    with pytest.raises(UserError, match=r"holds a.item and some.item; keep one"):
        read_log(write(tmp_path / "two", LAYOUTS["recbole"] | {"some.inter": b"", "a.item": b""}), BadRecords())
    with pytest.raises(UserError, match=r"movies.csv: not found; it has the titles of MovieLens latest"):
        read_log(write(tmp_path, {"ratings.csv": b"x"}), BadRecords())


def make_log(users: int, items: int, rows: int, seed: int, timed: bool) -> Log:
    rng = np.random.default_rng(seed)
    times = rng.integers(1000, size=rows).astype(np.float64) if timed else None
    return Log(
        [f"u{n}" for n in range(users)],
        [f"i{n}" for n in range(items)],
        [f"title {n // 2}" if n % 7 else "" for n in range(items)],  # shared titles, and some without one
        rng.integers(users, size=rows).astype(np.int32),
        rng.integers(items, size=rows).astype(np.int32),
        rng.integers(1, 9, size=rows).astype(np.float32),
        times,
    )


def groups(table: Interactions) -> dict[str, list[tuple[str, str, float, float]]]:
    """User id -> (split, item id, weight, time) of its interactions, in order."""
    found: dict[str, list] = {}
    times = table.times if table.times is not None else np.zeros(len(table))
    for user, item, weight, time, name in zip(
        table.users, table.items, table.weights, times, table.splits, strict=True
    ):
        found.setdefault(table.user_ids[user], []).append((SPLITS[name], table.item_ids[item], weight, time))
    return found


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(["leave_last_out", "time"]), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_splits_of_any_log(seed, timed, rule, shortest):
    log = make_log(6, 30, 150, seed, timed or rule == "time")
    options = Options(split=rule, min_history=shortest, train_targets=3, min_weight=2, seed=seed % 5)
    try:
        table, left_out = split(log, options)
    except UserError:
        return
    has_title = {i for i, title in zip(log.item_ids, log.titles, strict=True) if title}
    users = groups(table)
    if rule == "leave_last_out":  # all else has a purpose; what is below the weight is tested below
        users = {user: [row for row in mine if row[0] != "unused"] for user, mine in users.items()}
    assert len(set(table.titles)) == len(table.titles) == len(set(table.item_ids))
    assert left_out["users with too short a history"] == len(set(log.users.tolist())) - len(users)
    rows = list(zip(log.users, log.items, log.weights, log.times if log.times is not None else log.users, strict=True))
    for user, mine in users.items():
        names = [name for name, *_ in mine]
        items = [item for _, item, *_ in mine]
        counts = {name: names.count(name) for name in SPLITS}
        assert counts["history"] >= shortest and counts["train"] <= 3
        assert max(counts["validation"], counts["test"]) <= 1
        known = [(f"i{i}", w, t) for u, i, w, t in rows if f"u{u}" == user and f"i{i}" in has_title and w >= 2]
        enough = {i for i, *_ in known}
        assert all(name == "unused" for name, item, *_ in mine if item not in enough)
        mine = [row for row in mine if row[1] in enough]
        items = [item for _, item, *_ in mine]
        assert len(set(items)) == len(items) and set(items) == {i for i, *_ in known}
        if log.times is not None:
            first = {i: min(t for j, _, t in known if j == i) for i in items}
            assert [first[i] for i in items] == sorted(first.values()) == [time for *_, time in mine]
            end = max(time for name, *_, time in mine if name == "history")
        for name, item, weight, time in mine:
            if name == "history":
                before = [w for i, w, t in known if i == item and (log.times is None or t <= end)]
                assert weight == sum(before)
            elif log.times is not None:
                assert time >= end
        if rule == "leave_last_out":
            asked = counts["train"]
            assert names == ["history"] * (len(names) - asked - 2) + ["train"] * asked + ["validation", "test"]
            assert asked == min(3, max(0, len(names) - 2 - shortest))
    if rule == "time":
        spans = {n: [t for mine in users.values() for m, *_, t in mine if m == n] for n in SPLITS[:4]}
        ends = [(min(times), max(times)) for times in spans.values() if times]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))  # the same cuts for all users


def test_the_order_of_a_log_without_times_is_the_seeds():
    log = make_log(6, 30, 150, 0, timed=False)
    one, again, other = (split(log, Options(seed=seed))[0] for seed in (1, 1, 2))
    assert (one.items == again.items).all() and (one.items != other.items).any()
    last = [one.items[one.users == user][-1] for user in range(6)]
    assert len(set(last)) > 2  # users have orders of their own


def test_a_time_split_needs_times_and_enough_history():
    with pytest.raises(UserError, match=r"interactions/time: needs a column of times"):
        split(make_log(3, 9, 30, 0, timed=False), Options(split="time"))
    with pytest.raises(UserError, match=r"no interaction has a title and a weight of 99"):
        split(make_log(3, 9, 30, 0, timed=True), Options(split="time", min_weight=99))
    with pytest.raises(UserError, match=r"no user has 99 items before those"):
        split(make_log(3, 9, 30, 0, timed=True), Options(min_history=99))


@pytest.mark.parametrize("rule", ["uniform", "popularity"])
def test_candidates_are_items_the_user_never_had(rule):
    options = Options(candidates=rule, num_candidates=8, context=4)
    table, _ = split(make_log(30, 60, 600, 3, timed=True), options)
    items = dict(zip(table.titles, table.item_ids, strict=True))
    mine = groups(table)
    for name in ("validation", "test"):
        made = list(records(table, options, name))
        assert [record.user_id for record in made] == table.user_ids
        for record in made:
            had = {item for _, item, *_ in mine[record.user_id]}
            true, *wrong = (items[title] for title in record.candidates)
            assert (name, true) in [(n, i) for n, i, *_ in mine[record.user_id]]
            assert record.messages[-1] == {"role": "assistant", "content": record.candidates[0]}
            assert len(wrong) == len(set(wrong)) == 7 and not had & set(wrong)
            history = [i for n, i, *_ in mine[record.user_id] if n == "history"]
            assert [items[title] for title in record.context] == history[-4:]
    assert all(not record.candidates for record in records(table, options, "train"))


def test_candidates_follow_the_stated_rule():
    """Frequencies over many draws against the shares of a catalogue where item n was played about n times."""
    rng = np.random.default_rng(0)
    items = np.concatenate([np.repeat(np.arange(20), np.arange(1, 21) * 40), rng.integers(20, 40, 4000)])
    users = rng.integers(2000, size=len(items))
    log = Log([str(n) for n in range(2000)], [str(n) for n in range(40)], [f"t{n}" for n in range(40)],
              users.astype(np.int32), items.astype(np.int32), np.ones(len(items), np.float32), None)  # fmt: skip
    for rule in ("uniform", "popularity"):
        options = Options(candidates=rule, num_candidates=2, min_history=1)
        table, _ = split(log, options)
        drawn = [table.titles.index(record.candidates[1]) for record in records(table, options, "test")]
        counts = np.bincount(drawn, minlength=40)
        rare, common = counts[:10].sum(), counts[10:20].sum()
        assert (common > 2 * rare) == (rule == "popularity"), (rule, rare, common)


@pytest.mark.parametrize("rule", ["leave_last_out", "time"])
def test_what_a_user_rated_low_is_no_wrong_candidate(rule):
    """It is in no record at all, though others like it; an item that all rate low is in no catalogue."""
    log = make_log(20, 40, 800, 1, timed=True)
    log.weights[log.items == 39] = 1
    rated = {(log.user_ids[user], log.item_ids[item]) for user, item in zip(log.users, log.items, strict=True)}
    options = Options(split=rule, min_weight=5, num_candidates=500, min_history=1)
    table, _ = split(log, options)
    ids = dict(zip(table.titles, table.item_ids, strict=True))
    made = [record for name in ("validation", "test") for record in records(table, options, name)]
    assert made and "i39" not in table.item_ids
    for record in made:
        assert not {(record.user_id, ids[title]) for title in record.candidates[1:]} & rated
    assert (table.of("history", "train", "validation", "test").weights >= 5).all()


def test_notes_count_users_without_records_ties_and_titles_alike(tmp_path, capsys):
    """Ann and cat play all the time, two things at once in the last window; bob in one sitting before the cuts."""
    times = [100, 110, 120, 130, 140, 150, 160, 170, 170, 180]
    plays = [("ann", n, time) for n, time in enumerate(times)] + [("cat", n + 10, time) for n, time in enumerate(times)]
    plays += [("bob", n, 95) for n in range(4)]
    titles = [f"{['Song', 'SONG', 'song'][n % 3]} {n // 3}" if n < 10 else f"solo {n}" for n in range(20)]
    files = {
        "interactions.csv": "user,item,time\n" + "".join(f"{user},i{item},{time}\n" for user, item, time in plays),
        "items.csv": "item,title\n" + "".join(f"i{n},{title}\n" for n, title in enumerate(titles)),
    }
    manual = write(tmp_path / "raw", {name: text.encode() for name, text in files.items()})
    prepare("interactions/time", manual, tmp_path, ["held_out=0.2"])
    said = capsys.readouterr().err
    assert "of 3 users, 1 without a train record, 1 without a validation record, 1 without a test record: all" in said
    assert "2 of 8 titles asked for are at the same time as another item of their user" in said
    assert "9 titles differ from another in case alone" in said
    assert "validation: 0% of the true and 20% of the wrong candidates are asked for in train" in said


def test_each_part_of_a_history_is_asked_of_the_rest():
    log = make_log(12, 40, 600, 3, timed=True)
    options = Options(split="time", folds=3, train_targets=2)
    table, _ = split(log, options)
    plain = split(log, Options(split="time", train_targets=2))[0]
    assert table.splits.tolist() == plain.splits.tolist() and plain.folds is None
    made = list(records(table, options, "train"))
    assert made[: len(table.of("train"))] == list(records(plain, options, "train"))
    number = {title: item for item, title in zip(table.item_ids, table.titles, strict=True)}
    for user, mine in groups(table).items():
        history = [item for name, item, *_ in mine if name == "history"]
        parts = [record for record in made if record.user_id.startswith(f"{user}#")]
        assert [record.user_id for record in parts] == [f"{user}#{n}" for n in range(3)]
        assert sorted(item for part in parts for item in part.items) == sorted(history)
        assert max(len(part.items) for part in parts) - min(len(part.items) for part in parts) <= 1
        for part in parts:
            assert [number[title] for title in part.context] == [i for i in history if i not in part.items][-50:]
            assert number[part.messages[1]["content"]] == part.items[0]  # the last of the part
            assert part.items[0] == max(part.items, key=history.index)


def test_several_titles_are_asked_for_in_a_window():
    log = make_log(20, 40, 800, 1, timed=True)
    one, three = (split(log, Options(split="time", held_out_targets=n))[0] for n in (1, 3))
    for name in ("validation", "test"):
        counts = np.bincount(three.of(name).users)
        assert counts.max() == 3 and np.bincount(one.of(name).users).max() == 1
        asked = list(records(three, Options(split="time", held_out_targets=3), name))
        assert len(asked) == counts.sum() and all(len(record.items) == 1 for record in asked)


def test_new_items_come_out_with_the_test():
    log = make_log(40, 60, 2400, 1, timed=True)

    def pairs(share: float, *names: str) -> set[tuple[str, str]]:
        part = split(log, Options(split="time", held_out_targets=9, new_items=share))[0].of(*names)
        return {(part.user_ids[u], part.item_ids[i]) for u, i in zip(part.users, part.items, strict=True)}

    before = ("history", "train", "validation")
    assert pairs(0.3, "test") == pairs(0.0, "test")  # the same is asked
    known, had = pairs(0.3, *before), pairs(0.0, *before)
    new = {item for _, item in had} - {item for _, item in known}
    assert 0.2 * 60 < len(new) < 0.4 * 60
    assert known == {(user, item) for user, item in had if item not in new}
    assert had - known <= pairs(0.3, "unused")  # no wrong candidates for those who had them


def test_a_small_catalogue_gives_what_it_has():
    table, _ = split(make_log(4, 20, 60, 5, timed=True), Options(min_history=1))
    for record in records(table, Options(num_candidates=500), "test"):
        user = table.user_ids.index(record.user_id)
        assert len(record.candidates) == len(table.item_ids) - (table.users == user).sum() + 1


def test_a_log_without_times_shows_the_heaviest_first():
    table, _ = split(make_log(4, 60, 90, 5, timed=False), Options())
    for record in records(table, Options(context=3), "test"):
        mine = table.of("history").users == table.user_ids.index(record.user_id)
        weights = dict(zip(table.of("history").items[mine].tolist(), table.of("history").weights[mine], strict=True))
        shown = [weights[table.titles.index(title)] for title in record.context]
        assert shown == sorted(weights.values(), reverse=True)[:3]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    rows = "".join(f"u{rng.integers(20)},i{rng.integers(50)},1,{rng.integers(1000)}\n" for _ in range(400))
    titles = "".join(f'i{n},"Song, {n}"\n' for n in range(50))
    files = {
        "interactions.csv": f"user,item,weight,time\n{rows}".encode(),
        "items.csv": f"item,title\n{titles}".encode(),
    }
    return write(tmp_path_factory.mktemp("own"), files)


def test_prepared_records_and_interactions_belong_together(own, tmp_path):
    directory = prepare("interactions", own, tmp_path, ["num_candidates=10", "seed=4"])
    options = Options(num_candidates=10, seed=4)
    table, _ = split(read_log(own, BadRecords()), options)
    kept = load_interactions(directory)
    assert groups(kept) == groups(table) and kept.titles == table.titles
    for name in ("train", "validation", "test"):
        made = list(records(table, options, name))
        read = load_records(str(directory), name)
        assert [(r.user_id, r.context, r.messages, r.candidates) for r in read] == [
            (r.user_id, r.context, r.messages, r.candidates) for r in made
        ]
    with pytest.raises(UserError, match=r"give the directory that `e2p prepare interactions` printed"):
        load_interactions(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sed=1"], r"--set sed=1: give name=value; interactions/leave_last_out has candidates, .*train_targets$"),
        (["seed"], r"--set seed: give name=value"),
        (["seed=x"], r"--set seed=x: seed must be of type int"),
        (["candidates=best"], r"--set candidates=best: choose from uniform, popularity"),
        (["split=time"], r"--set split=time: .* has candidates"),  # that is what the configurations are for
        (["num_candidates=1"], r"option num_candidates must be 2 or more"),
        (["train_targets=0"], r"option train_targets must be 1 or more"),
        (["min_history=0"], r"option min_history must be 1 or more"),
        (["held_out=0.5"], r"option held_out must be above 0"),
        (["context=0"], r"option context must be 1 or more"),
        (["question= "], r"option question must not be empty"),
    ],
)
def test_options_that_cannot_be_are_refused(own, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare("interactions", own, tmp_path, options)


def test_every_option_changes_the_result(own):
    log = read_log(own, BadRecords())

    def made(**changes: object) -> list:
        options = Options(**changes)
        table, _ = split(log, options)
        return [list(records(table, options, name)) for name in ("train", "validation", "test")]

    log.weights[::3] = 5
    changes = {
        "split": "time", "candidates": "popularity", "num_candidates": 7, "seed": 1, "train_targets": 2,
        "min_history": 12, "min_weight": 2.0, "context": 2, "question": "And now?",
    }  # fmt: skip
    for name, value in changes.items():
        assert made(**{name: value}) != made(), name
    for name, value in {"held_out": 0.2, "held_out_targets": 2, "folds": 2, "new_items": 0.5}.items():
        assert made(split="time", **{name: value}) != made(split="time"), name


def test_options_have_a_directory_of_their_own(own, tmp_path):
    plain, seeded = (prepare("interactions", own, tmp_path, options) for options in ((), ("seed=1",)))
    assert plain.parent.name == "leave_last_out" and seeded.parent.name.startswith("leave_last_out-")
    assert prepare("interactions/leave_last_out", own, tmp_path, ["seed=0"]) == plain  # what it has anyway
    assert load_records(str(plain), "test") != load_records(str(seeded), "test")
