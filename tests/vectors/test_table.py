"""Tables of user vectors: every form reads the same, every fault is named."""

import csv
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.prepared import load_table
from e2p_jax.errors import UserError
from e2p_jax.vectors import arrays
from e2p_jax.vectors import table as module
from e2p_jax.vectors.table import UserTable, save_table

IDS = ["ann", "bob", "zoë 3", "17"]
VECTORS = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def write(form: str, place: Path, ids: list[str] = IDS, vectors: np.ndarray = VECTORS) -> Path:
    """Writes a table with other people's tools; returns what to pass to `load_table`."""
    if form == "npz":
        np.savez(place / "t.npz", ids=np.array(ids), embeddings=vectors)
    elif form == "npy":
        np.save(place / "t.npy", vectors)
        (place / "t.ids.txt").write_text("\n".join(ids), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.table({"user_id": ids, "embedding": list(vectors)}), place / "t.parquet")
    elif form == "parquet, fixed size":
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        pq.write_table(pa.table({"user_id": ids, "embedding": flat}), place / "t.parquet", row_group_size=2)
    elif form in ("arrow", "feather, LanceDB's names"):
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        names = ("user_id", "embedding") if form == "arrow" else ("id", "vector")
        table = pa.table(dict(zip(names, [pa.array(ids, pa.large_string()), flat], strict=True)))
        with (
            pa.OSFile(str(place / f"t.{form.split(',')[0]}"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as out,
        ):
            out.write_table(table, max_chunksize=2)
    elif form in ("csv", "tsv"):
        with (place / f"t.{form}").open("w", encoding="utf-8", newline="") as file:
            out = csv.writer(file, delimiter="," if form == "csv" else "\t")
            out.writerows([["user", *range(vectors.shape[1])], *([u, *v] for u, v in zip(ids, vectors, strict=True))])
    else:
        save_table(place / "t", ids, vectors, name="made", version="1")
        return place / "t"
    return place / f"t.{form.split(',')[0]}"


FORMS = [
    "directory",
    "npz",
    "npy",
    "parquet",
    "parquet, fixed size",
    "arrow",
    "feather, LanceDB's names",
    "csv",
    "tsv",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same(tmp_path: Path, form: str) -> None:
    table = load_table(str(write(form, tmp_path)))
    assert (table.width, len(table), list(table.ids)) == (5, 4, IDS)
    vectors = table.lookup(["17", "ann", "17"], ["a", "b", "c"])
    np.testing.assert_array_equal(vectors, VECTORS[[3, 0, 3]])
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("form", ["directory", "npy"])
def test_arrays_are_memory_mapped(tmp_path: Path, form: str) -> None:
    table = load_table(str(write(form, tmp_path)))
    assert isinstance(table.vectors, np.memmap)
    assert not table.vectors.flags.writeable


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a system without large pages")
def test_vectors_are_brought_in_in_large_pages(tmp_path: Path) -> None:
    table = load_table(str(write("directory", tmp_path)))
    assert len(table) == 4
    flags: list[str] = []
    mapped = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "embeddings.npy" in line:
            mapped = str(tmp_path) in line
        elif mapped and line.startswith("VmFlags:"):
            flags, mapped = line.split(), False
    assert "hg" in flags


def test_directory_is_what_the_contract_says(tmp_path: Path) -> None:
    place = write("directory", tmp_path, vectors=VECTORS.astype(np.float16))
    assert sorted(p.name for p in place.iterdir()) == ["embeddings.npy", "ids.txt", "index.npy", "meta.json"]
    meta = json.loads((place / "meta.json").read_text())
    assert meta == {"name": "made", "version": "1", "width": 5, "dtype": "float16"}
    assert (place / "ids.txt").read_text(encoding="utf-8").splitlines() == IDS
    assert np.load(place / "embeddings.npy").dtype == np.float16
    assert load_table(str(place)).lookup(["ann"], ["here"]).dtype == np.float32


def test_missing_user_is_named(tmp_path: Path) -> None:
    table = load_table(str(write("npz", tmp_path)))
    with pytest.raises(UserError, match=r"r\.jsonl:9: user 'eve' has no vector in .*t\.npz; add it or drop"):
        table.lookup(["ann", "eve"], ["r.jsonl:8", "r.jsonl:9"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("form", FORMS)
def test_vector_that_is_not_finite_names_user_and_row(tmp_path: Path, form: str, bad: float) -> None:
    vectors = VECTORS.copy()
    vectors[2, 4] = bad
    table = load_table(str(write(form, tmp_path, vectors=vectors)))
    np.testing.assert_array_equal(table.lookup(["bob"], ["here"]), VECTORS[1:2])  # nobody asked for row 2
    with pytest.raises(UserError, match=r"t.*: row 2 \(user 'zoë 3'\) holds NaN or infinity"):
        table.lookup(["bob", "zoë 3"], ["here", "there"])


@pytest.mark.parametrize("form", FORMS)
def test_one_user_with_two_vectors_is_refused(tmp_path: Path, form: str) -> None:
    ids = ["ann", "bob", "cy", "bob"]
    with pytest.raises(UserError, match=r"user 'bob' has different vectors in rows 1 and 3"):
        load_table(str(write(form, tmp_path, ids=ids)))
    vectors = VECTORS.copy()
    vectors[3] = vectors[1]
    table = load_table(str(write(form, tmp_path, ids=ids, vectors=vectors)))
    np.testing.assert_array_equal(table.lookup(["bob"], ["here"]), VECTORS[1:2])
    assert len(table) == 3


@pytest.mark.parametrize("form", ["npz", "npy", "directory"])
def test_counts_must_match(tmp_path: Path, form: str) -> None:
    with pytest.raises(UserError, match="4 ids for 3 vectors; they must match row by row"):
        load_table(str(write(form, tmp_path, vectors=VECTORS[:3])))


def test_width_must_be_what_meta_says(tmp_path: Path) -> None:
    place = write("directory", tmp_path)
    np.save(place / "embeddings.npy", VECTORS[:, :4])
    with pytest.raises(UserError, match=r"embeddings\.npy has shape \(4, 4\), but meta\.json says width 5"):
        load_table(str(place))


@pytest.mark.parametrize(
    "meta", ["{", "[]", '{"dtype": "float32"}', '{"width": "5"}', '{"width": 5, "width": 5}', "[" * 99_999, "\udcff"]
)
def test_broken_meta_is_named(tmp_path: Path, meta: str) -> None:
    place = write("directory", tmp_path)
    (place / "meta.json").write_bytes(meta.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"meta\.json: .*must be a JSON object with a width"):
        load_table(str(place))


def _npz(path: Path, **arrays: Any) -> Path:
    np.savez(path / "t.npz", **arrays)
    return path / "t.npz"


def _npy(path: Path, array: np.ndarray) -> Path:
    np.save(path / "t.npy", array, allow_pickle=True)
    (path / "t.ids.txt").write_text("\n".join(IDS))
    return path / "t.npy"


def _text(path: Path, name: str, text: str = "no table") -> Path:
    return _bytes(path, name, text.encode())


def _bytes(path: Path, name: str, content: bytes) -> Path:
    (path / name).write_bytes(content)
    (path / "t.ids.txt").write_text("ann\n")
    return path / name


def _parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path / "t.parquet")
    return path / "t.parquet"


def _zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return path / "t.npz"


def _header(shape: Any, kind: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


OBJECTS = np.array([{"any": "thing"}, None], object)
F32S = pa.list_(pa.float32())
FAULTS = {
    "pickled vectors": (lambda p: _npz(p, ids=np.array(IDS), embeddings=OBJECTS), "unreadable.*not objects"),
    "pickled ids": (lambda p: _npz(p, ids=np.array(IDS, object), embeddings=VECTORS), "unreadable.*not objects"),
    "pickled npy": (lambda p: _npy(p, OBJECTS), "unreadable.*not objects"),
    "no ids": (lambda p: _npz(p, embeddings=VECTORS), r"needs the arrays `embeddings` and `ids`, has \['embeddings'\]"),
    "ids that are no array": (lambda p: _zip(p, ids=b"ann", embeddings_npy=_saved(VECTORS)), r"has \['embeddings'\]"),
    "a member cut short": (lambda p: _zip(p, ids_npy=_saved(VECTORS), embeddings_npy=_header((9, 9))), "unreadable"),
    "negative sizes": (lambda p: _zip(p, ids_npy=_saved(VECTORS), embeddings_npy=_header((-1, -1))), "unreadable"),
    "bytes after the end": (lambda p: _bytes(p, "t.npy", _saved(VECTORS) + b"x"), "bytes are not what its header says"),
    "an npz called npy": (lambda p: _npz(_npy(p, VECTORS).parent, a=VECTORS).rename(p / "t.npy"), "unreadable"),
    "width 0": (lambda p: _npz(p, ids=np.array(IDS), embeddings=VECTORS[:, :0]), r"shape \(4, 0\)"),
    "width 0 of Parquet": (lambda p: _parquet(p, user_id=["a"], embedding=pa.array([[]], F32S)), r"shape \(1, 0\)"),
    "other byte order": (lambda p: _npz(p, ids=np.array(IDS), embeddings=VECTORS.astype(">f4")), "byte order"),
    "half a surrogate": (lambda p: _npz(p, ids=np.array([*IDS[:3], "\ud800"]), embeddings=VECTORS), "row 3: .*half a"),
    "long name": (lambda p: p / ("x" * 5000), r"data.embeddings: '.*x\.\.\.' cannot be opened \(File name too long\)"),
    "NUL in the name": (lambda p: p / "a\0b", r"a\\x00b' cannot be opened \(.*embedded null"),
    "nobody's home": (lambda p: Path("~nobody-here/t"), r"~nobody-here/t' cannot be opened"),
    "one vector": (lambda p: _npy(p, VECTORS[0]), r"shape \(5,\) and dtype float32; save them as \[users, width\]"),
    "text": (lambda p: _npy(p, np.array([["a", "b"]] * 4)), "dtype <U1; save them as"),
    "whole numbers": (lambda p: _npy(p, np.arange(8).reshape(4, 2)), "dtype int64; save them as"),
    "not an npy": (lambda p: _text(p, "t.npy"), "unreadable"),
    "not an npz": (lambda p: _text(p, "t.npz"), "unreadable"),
    "not a parquet": (lambda p: _text(p, "t.parquet"), "unreadable.*give a Parquet file"),
    "numbers as text": (lambda p: _text(p, "t.csv", "user,0\nann,1.0\nbob,x\n"), r":3: CSV conversion error .*'x'"),
    "cells": (lambda p: _text(p, "t.csv", "user,0\nann,1.0\nbob\n"), r":3: Expected 2 columns, got 1.*an id and 1 num"),
    "empty cell": (lambda p: _text(p, "t.csv", "user,0\nann,\n"), r":2: CSV conversion error .*''; a line is an id"),
    "one column": (
        lambda p: _text(p, "t.tsv", "u,0\nann,1\n"),
        "its first line has one column; one is the user's id, every other a number, between tabs",
    ),
    "no lines": (lambda p: _text(p, "t.csv", ""), "t.csv: "),
    "Latin-1": (lambda p: _bytes(p, "t.csv", b"user,0\nZo\xeb,1\n"), "invalid UTF8"),
    "null id": (lambda p: _parquet(p, user_id=["a", None], embedding=[[1.0], [2.0]]), "row 1: user_id is null"),
    "ids of floats": (lambda p: _parquet(p, user_id=[1.5], embedding=[[1.0]]), "`user_id` has type double; make it"),
    "ids of bytes": (lambda p: _npz(p, ids=np.array([b"Zo\xeb"]), embeddings=VECTORS[:1]), "ids are not UTF-8"),
    "ids of two columns": (lambda p: _npz(p, ids=np.array([["a", "b"]]), embeddings=VECTORS[:1]), r"shape \(1, 2\)"),
    "text file": (lambda p: _text(p, "t.txt"), "not a table; give a table directory, .npz, .parquet"),
    "columns": (lambda p: _parquet(p, user=IDS), r"needs the columns `user_id` and `embedding`, has \['user'\]"),
    "ragged": (
        lambda p: _parquet(p, user_id=["a", "b"], embedding=[[1.0], [1.0, 2.0]]),
        r"row 1: vectors have different widths \[1, 2\]",
    ),
    "null": (lambda p: _parquet(p, user_id=["a", "b"], embedding=[[1.0], None]), "is null; drop that row"),
    "no lists": (lambda p: _parquet(p, user_id=["a"], embedding=[1.0]), "type double; make it lists of numbers"),
    "lists of text": (lambda p: _parquet(p, user_id=["a"], embedding=[["x"]]), "make it lists of numbers"),
    "empty directory": (lambda p: p, "not a table of user vectors; missing embeddings.npy, ids.txt, meta.json"),
    "nothing": (lambda p: p / "none.npz", "data.embeddings: .*none.npz does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_line_that_names_the_file(tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_table(str(path))
    assert str(path)[:70] in str(caught.value).replace("\\x00", "\0")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_file_that_would_fill_the_memory_is_refused(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its size alone: what it holds is not read. Where the bound is lower, so that the test's file is small."""
    vectors = np.zeros((4, 500_000), np.float32)
    if form == "npz":
        np.savez_compressed(tmp_path / "t.npz", ids=IDS, embeddings=vectors)
    else:
        lists = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
        pq.write_table(pa.table({"user_id": IDS, "embedding": lists}), tmp_path / "t.parquet", compression="zstd")
    assert load_table(str(tmp_path / f"t.{form}")).width == 500_000
    monkeypatch.setattr(arrays, "_LARGE", 1 << 20)
    with pytest.raises(UserError, match=rf"t\.{form}: `embeddings?` takes 8 MB, from 0\.. MB in the file"):
        load_table(str(tmp_path / f"t.{form}"))


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """Members and columns that nobody asks for may hold anything."""
    path = _zip(tmp_path, ids_npy=_saved(np.array(IDS)), embeddings_npy=_saved(VECTORS), more_npy=b"\x93NUMPY", raw=b"")
    assert list(load_table(str(path)).ids) == IDS
    other = pa.array([{"no": "vector"}] * 4)
    table = pa.table({"other": other, "user_id": IDS, "embedding": list(VECTORS)})
    pq.write_table(table, tmp_path / "t.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "t.feather")
    for name in ("t.parquet", "t.feather"):
        np.testing.assert_array_equal(load_table(str(tmp_path / name)).lookup(IDS, IDS), VECTORS)


@pytest.mark.parametrize("form", ["parquet", "feather"])
def test_categories_are_read_as_the_ids_they_stand_for(tmp_path: Path, form: str) -> None:
    for ids in (pa.array(IDS), pa.array([10, 7, 3, 5])):
        table = pa.table({"user_id": ids.dictionary_encode(), "embedding": list(VECTORS)})
        write_file = pq.write_table if form == "parquet" else pyarrow.feather.write_feather
        write_file(table, tmp_path / f"t.{form}")
        assert list(load_table(str(tmp_path / f"t.{form}")).ids) == [str(user) for user in ids.to_pylist()]


def test_two_vectors_of_a_user_are_compared_by_their_length(tmp_path: Path) -> None:
    """Copies may differ by what float16 rounds away, however short the vectors are."""
    short = np.array([[1e-4, 2e-4], [-5e-4, 7e-4]], np.float32)
    for scale in (1.0, 1e-30, 1e30):
        with pytest.raises(UserError, match="user 'a' has different vectors in rows 0 and 1"):
            UserTable(["a", "a"], short * np.float32(scale), "here")
        first = short[:1] * np.float32(scale)
        assert len(UserTable(["a", "a"], np.concatenate([first, first * np.float32(1.0003)]), "here")) == 1
    assert len(UserTable(["a", "a"], np.zeros((2, 2), np.float32), "here")) == 1


@pytest.mark.parametrize(
    ("there", "asked"),
    [("10.0", "10"), ("10", "10.0"), ("7", "007"), (" ann", "ann"), ("ann\r", "ann"), ("ann", "ann "), ("Ann", "ann")],
)
def test_id_that_another_program_made_something_of_is_named(there: str, asked: str) -> None:
    table = UserTable([there, "other"], VECTORS[:2], "the table")
    with pytest.raises(UserError) as caught:
        table.lookup([asked], ["r.jsonl:1"])
    assert str(caught.value) == (
        f"r.jsonl:1: user {asked!r} has no vector in the table, but {there!r} has; ids must agree to the letter, so "
        "mend one of the two"
    )


def test_npy_needs_its_ids_beside_it(tmp_path: Path) -> None:
    path = write("npy", tmp_path)
    (tmp_path / "t.ids.txt").write_bytes(b"Zo\xeb\n")
    with pytest.raises(UserError, match=r"t\.ids\.txt:1: not UTF-8"):
        load_table(str(path))
    (tmp_path / "t.ids.txt").unlink()
    with pytest.raises(UserError, match=r"t\.npy: needs the user ids beside it, .* in t\.ids\.txt"):
        load_table(str(path))


@pytest.mark.parametrize("user", ["", "two\nlines", "carriage\rreturn"])
def test_id_that_fits_on_no_line_is_refused_before_writing(tmp_path: Path, user: str) -> None:
    with pytest.raises(UserError, match="is empty or holds a line break"):
        save_table(tmp_path / "t", [user, "b"], VECTORS[:2], name="n", version="1")
    assert list(tmp_path.iterdir()) == []


def test_odd_ids_survive_the_directory(tmp_path: Path) -> None:
    ids = ["a\u2028b", " padded ", "tab\there", "x\x0by"]
    assert list(load_table(str(write("directory", tmp_path, ids=ids))).ids) == ids


def test_synthetic_table_has_a_vector_for_every_record() -> None:
    table = load_table("synthetic")
    for split, count in (("train", 3000), ("validation", 200)):
        users = [record.user_id for record in synthetic.records(split)]
        assert table.lookup(users, users).shape == (count, synthetic.WIDTH)
    np.testing.assert_array_equal(table.lookup(["user-10007"], [""])[0], synthetic.vector(10_007))


def test_lookup_of_nobody_is_empty() -> None:
    assert UserTable(IDS, VECTORS, "here").lookup([], []).shape == (0, 5)


@pytest.mark.parametrize("window", [1, 1 << 26])
def test_rows_come_in_the_order_asked_whatever_the_window(
    tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WINDOW", window)
    monkeypatch.setattr(module, "_BLOCK", 3)
    ids, vectors = [f"u{n}" for n in range(50)], np.random.default_rng(1).normal(size=(50, 4)).astype(np.float16)
    table = load_table(str(write("directory", tmp_path, ids, vectors)), "null")
    rows = np.random.default_rng(2).integers(-1, 50, 200)
    found = table.lookup([f"u{row}" if row >= 0 else "nobody" for row in rows], [])
    np.testing.assert_array_equal(found[rows >= 0], vectors[rows[rows >= 0]].astype(np.float32))
    assert np.isnan(found[rows < 0]).all() and not np.isnan(found[rows >= 0]).any()


def test_ids_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    ids = load_table(str(write("npz", tmp_path, ["a", "b", "a", "c"], VECTORS[[0, 1, 0, 2]]))).ids
    assert (ids[0], ids[-1], ids[1:], ids[::-1], list(ids)) == ("a", "c", ["b", "c"], ["c", "b", "a"], ["a", "b", "c"])
    with pytest.raises(IndexError):
        ids[3]


@pytest.mark.parametrize(
    ("dtype", "bits"), [(np.float16, 0x7D00), (np.float32, 0x7FA00000), (np.float64, 0x7FF4 << 48)]
)
@pytest.mark.parametrize("ids", [["a", "b", "c"], ["a", "b", "a"]])
def test_a_nan_that_signals_is_one_as_others_are(tmp_path: Path, dtype: type, bits: int, ids: list[str]) -> None:
    """NumPy warns where it casts one, as a damaged file may hold."""
    vectors = np.ones((3, 2), dtype)
    vectors.view(f"u{vectors.itemsize}")[2, 1] = bits
    np.savez(tmp_path / "t.npz", ids=np.array(ids), embeddings=vectors)
    with pytest.raises(UserError, match=r"NaN or infinity|different vectors"):
        table = load_table(str(tmp_path / "t.npz"))
        table.lookup(list(table.ids), ["here"] * 3)


DAMAGE = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "insert", "double"]), st.floats(0, 1), st.binary(min_size=1, max_size=4)),
    max_size=3,
)


@pytest.mark.parametrize("form", FORMS)
@given(damage=DAMAGE, bad=st.sampled_from([0.0, np.nan, np.inf, -np.inf]), ids=st.permutations([*IDS, "ann"]))
def test_damaged_file_is_a_table_or_one_line_that_names_it(
    form: str, damage: list[tuple[str, float, bytes]], bad: float, ids: list[str]
) -> None:
    vectors = VECTORS.copy()
    vectors[2, 3] = bad
    with tempfile.TemporaryDirectory() as folder:
        if form == "directory" and len(set(ids[:4])) < 4:
            return  # refused before it is written
        place = write(form, Path(folder), ids[:4], vectors)
        files = sorted(place.iterdir()) if place.is_dir() else sorted(Path(folder).iterdir())
        for kind, where, extra in damage:
            file = files[int(where * 7919) % len(files)]
            content = bytearray(file.read_bytes())
            at = int(where * len(content))
            if kind == "cut":
                del content[at:]
            elif kind == "flip":
                content[at : at + len(extra)] = extra
            elif kind == "insert":
                content[at:at] = extra
            else:
                content += content[at:]
            file.write_bytes(content)
        try:
            table = load_table(str(place))
            found = table.lookup(list(table.ids), ["here"] * len(table))
            assert found.shape == (len(table), table.width) and np.isfinite(found).all()
        except UserError as error:
            assert folder in str(error) and "\n" not in str(error)
