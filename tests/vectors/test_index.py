"""Rows of user ids, against a dictionary: whatever the ids, in memory or from disk, and when hashes collide."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p_jax.errors import UserError
from e2p_jax.vectors import index as user_index
from e2p_jax.vectors.index import UserIndex

TEXTS = (st.text(max_size=6) | st.sampled_from(["a", "b", "ab", "zoë", ""])).filter(lambda t: t[:1] != "\ufeff")
ASKED = TEXTS | st.sampled_from(["\ud800", "\ufeffa"])


def expected(ids: list[str], asked: list[str]) -> list[int]:
    first: dict[str, int] = {}
    for row, user in enumerate(ids):
        first.setdefault(user, row)
    return [first.get(user, -1) for user in asked]


@given(ids=st.lists(TEXTS, max_size=40), others=st.lists(ASKED, max_size=10))
def test_rows_are_those_of_a_dictionary(ids: list[str], others: list[str]) -> None:
    index, asked = UserIndex.of(ids, "here"), [*ids, *others, *reversed(ids)]
    assert index.find(asked).tolist() == expected(ids, asked)
    assert index.ids(range(len(ids))) == ids
    assert (index.rows, len(index)) == (len(ids), len(set(ids)))
    assert index.repeats().tolist() == [row for row, user in enumerate(ids) if user in ids[:row]]


@pytest.mark.parametrize("kept", [0, 1 << 32, 0xFF << 56 | 0b11])
def test_ids_of_one_hash_are_told_apart_by_their_text(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that has one value, differs above the half that an entry keeps, or has few values."""
    strong = user_index.xxhash.xxh3_64_intdigest
    monkeypatch.setattr(user_index.xxhash, "xxh3_64_intdigest", lambda text: strong(text) & kept)
    ids = [f"user-{n % 50}" for n in range(60)]
    asked = [*ids, "user-50", "user-1 ", "x"]
    assert UserIndex.of(ids, "here").find(asked).tolist() == expected(ids, asked)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    ids, index = tmp_path / "ids.txt", tmp_path / "index.npy"
    ids.write_text("".join(f"user {n}\n" for n in range(1000)))
    UserIndex.open(ids).save(index)
    return ids, index


def test_index_on_disk_is_used(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_index, "build", None)
    index = UserIndex.open(*files)
    assert isinstance(index.words, np.memmap) and isinstance(index.text, np.memmap)
    assert index.find(["user 999", "user 0", "user", "user 1000"]).tolist() == [999, 0, -1, -1]
    assert index.ids(np.array([998, 999])) == ["user 998", "user 999"]


@pytest.mark.parametrize(
    "fault", ["other ids", "truncated", "no array", "zip", "other version", "header", "counts", "rows", "absent"]
)
def test_index_that_is_not_of_these_ids_is_made_anew(files: tuple[Path, Path], fault: str) -> None:
    ids, index = files
    words = np.load(index)
    if fault == "zip":
        np.savez(index.with_suffix(".npz"), words)
        index.with_suffix(".npz").rename(index)
    elif fault == "other ids":
        ids.write_text("".join(f"user {n}\n" for n in range(999, -1, -1)))
    elif fault == "truncated":
        index.write_bytes(index.read_bytes()[:-8])
    elif fault == "no array":
        index.write_bytes(b"nothing")
    elif fault == "absent":
        index.unlink()
    elif fault == "counts":  # as many words as before, of which one changes its part
        words[2:4] += np.array([-1, 1]).astype(np.uint64)
        np.save(index, words)
    elif fault == "rows":
        words[-1500] += 1
        np.save(index, words)
    else:
        words[0 if fault == "other version" else 4] = 63
        np.save(index, words)
    order = -1 if fault == "other ids" else 1
    for _ in range(2):  # the second time from the index that the first one wrote
        assert (
            UserIndex.open(ids, index).find([f"user {n}" for n in range(1000)]).tolist() == list(range(1000))[::order]
        )
    assert sorted(path.name for path in ids.parent.iterdir()) == ["ids.txt", "index.npy"]
    assert isinstance(UserIndex.open(ids, index).words, np.memmap)


def test_index_that_cannot_be_written_is_made_in_memory(files: tuple[Path, Path]) -> None:
    ids, index = files
    assert UserIndex.open(ids, index.parent / "no directory" / "index.npy").find(["user 7"]).tolist() == [7]


@pytest.mark.parametrize(
    ("content", "ids"),
    [(b"", []), (b"a", ["a"]), (b"a\n", ["a"]), (b"a\n\n", ["a", ""]), (b"\nb", ["", "b"]), (b"a\x0bc\n", ["a\x0bc"])],
)
def test_lines_of_a_file(tmp_path: Path, content: bytes, ids: list[str]) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    index = UserIndex.open(tmp_path / "ids.txt")
    assert index.ids(range(index.rows)) == ids
    assert index.find(ids).tolist() == list(range(len(ids)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\xff\n", r":2: not UTF-8"),
        (b"a\nb\r\n", r":2: ends with a carriage return"),
        (b"\xef\xbb\xbfa\nb\n", r":1: begins with a byte order mark"),
    ],
)
def test_lines_that_are_no_ids_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        UserIndex.open(tmp_path / "ids.txt")


@pytest.mark.parametrize(("user", "message"), [("\ud800", "half a surrogate pair"), ("\ufeffa", "byte order mark")])
def test_ids_that_are_no_text_are_named(user: str, message: str) -> None:
    with pytest.raises(UserError, match=f"here: row 1: user id .* {message}"):
        UserIndex.of(["b", user], "here")


def test_distinct_numbers_are_those_of_a_set() -> None:
    values = np.random.default_rng(0).integers(-5, 20_000, 30_000)
    once = sorted(set(values.tolist()))
    assert user_index.distinct(values).tolist() == once and user_index.distinct(values[:0]).tolist() == []
