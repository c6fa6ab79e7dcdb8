"""Outputs appear whole or not at all, and never at the cost of other files."""

from pathlib import Path

import pytest

from e2p_jax.errors import UserError
from e2p_jax.files import explain_refusal, replace_directory, write_text


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def write_directory(path: Path, **files: str) -> None:
    with replace_directory(path) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text)


def test_text_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    for text in ("one", "zwei\n"):
        write_text(tmp_path / "new" / "a.txt", text)
        assert contents(tmp_path) == {"new/a.txt": text}


def test_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with replace_directory(out) as temporary:
        (temporary / "a").write_text("1")
        assert not out.exists()
    assert contents(tmp_path) == {"deep/out/a": "1"}
    assert out.stat().st_mode & 0o777 == 0o755


def test_older_version_is_replaced(tmp_path: Path) -> None:
    write_directory(tmp_path / "out", a="old", b="old")
    write_directory(tmp_path / "out", a="new", b="new", c="new")
    assert contents(tmp_path) == {"out/a": "new", "out/b": "new", "out/c": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failed_block_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write_directory(tmp_path / "out", a="old")
    with pytest.raises(ZeroDivisionError), replace_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("half")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"out/a": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", [".", "out"])
def test_other_peoples_files_are_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path / "out" if where == "." else tmp_path)
    with pytest.raises(UserError, match=r"out: holds other files \(thesis\.tex\); choose an empty or new directory"):
        write_directory(Path(where), a="new")
    assert contents(tmp_path) == {"out/thesis.tex": "years of work"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out: is a file"):
        write_directory(tmp_path / "out", a="new")
    assert contents(tmp_path) == {"out": "a file"}


def test_outputs_in_a_bucket_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (write_directory, lambda path: write_text(path, "text")):
        with pytest.raises(UserError, match="gs:/bucket/out: only run directories can be in a bucket"):
            write(Path("gs://bucket/out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["x" * 300, "y/" * 3000, "nul\0", "file/below", "/proc/none", "/"])
def test_places_that_cannot_be_written_are_named(tmp_path: Path, place: str) -> None:
    """Before the work begins, where the work is a directory."""
    (tmp_path / "file").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    refused = pytest.raises(UserError, match=r"cannot be written \(.+\); choose another place")
    with refused, replace_directory(tmp_path / place):
        pytest.fail("the block was entered")
    with refused, explain_refusal(place):
        write_text(tmp_path / place, "text")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_ring_of_links_is_named(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(UserError, match=r"ring: cannot be written \(.+\)"):
        write_directory(tmp_path / "ring", a="new")


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    write_directory(tmp_path / "real", a="old")
    (tmp_path / "link").symlink_to("real")
    write_directory(tmp_path / "link", a="new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "new"
