"""Preparing datasets and reading records from every place they live in."""

import subprocess
import sys
from pathlib import Path

import pytest
import releases

from e2p_jax.cli import main
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.prepare import prepare
from e2p_jax.datasets.prepared import load_records
from e2p_jax.datasets.records import Record, write_jsonl
from e2p_jax.errors import UserError

DIALOGUE = "1 your persona: i run.\n2 hi\thello {0}\n1 your persona: i swim.\n2 hi\tgood day {0}\n"


@pytest.fixture
def manual(tmp_path: Path) -> Path:
    directory = tmp_path / "manual"
    directory.mkdir()
    for part in ("train", "valid"):
        (directory / f"{part}_self_original.txt").write_text(DIALOGUE.format(part))
    return directory


def snapshot(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_second_call_touches_nothing(manual, tmp_path, capsys):
    first = prepare("persona_chat", manual, tmp_path / "data")
    before = snapshot(tmp_path / "data")
    capsys.readouterr()
    assert prepare("persona_chat", manual, tmp_path / "data") == first
    assert snapshot(tmp_path / "data") == before
    assert capsys.readouterr() == ("", "")
    assert (first / "dataset_info.json").is_file()
    assert [path.name for path in first.glob("*train*")] == ["persona_chat-train.array_record-00000-of-00001"]


def test_progress_stays_off_stdout(manual, tmp_path, capsys):
    prepare("persona_chat", manual, tmp_path / "data")
    captured = capsys.readouterr()
    assert captured.out == "" and "Downloading and preparing" in captured.err


def test_other_original_files_are_not_passed_over(manual, tmp_path):
    directory = prepare("persona_chat", manual, tmp_path / "data")
    (manual / "valid_self_original.txt").write_text(DIALOGUE.format("again"))
    with pytest.raises(UserError, match=rf"^{directory}: not prepared from .*\(valid_self_original.txt\); delete it"):
        prepare("persona_chat", manual, tmp_path / "data")


def test_a_killed_run_is_not_in_the_way(manual, tmp_path):
    """The first run dies, with no chance to clean up, at the second dialogue."""
    dies = """if True:
        import os, sys, pathlib
        from e2p_jax.datasets import builder
        from e2p_jax.datasets import prepare
        check, manual, data = builder.check, *map(pathlib.Path, sys.argv[1:])
        builder.check = lambda record: os._exit(9) if "original.txt:3" in record.source else check(record)
        prepare.prepare("persona_chat", manual, data)
    """
    repository = Path(__file__).parents[2]
    run = [sys.executable, "-c", dies, str(manual), str(tmp_path / "data")]
    assert subprocess.run(run, cwd=repository, stderr=subprocess.DEVNULL, check=False).returncode == 9
    assert list((tmp_path / "data").rglob("incomplete*"))
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
    directory = prepare("persona_chat", manual, tmp_path / "data")
    assert len(load_records(str(directory), "train")) == len(load_records(str(directory), "validation")) == 2
    assert not list((tmp_path / "data").rglob("incomplete*"))


def test_flags_reach_the_data_set(tmp_path, capsys):
    release = releases.pens(tmp_path / "release")
    with (release / "valid.tsv").open("a") as file:
        file.write("cut off\n")
    arguments = ["prepare", "pens", "--manual-dir", str(release), "--data-dir", str(tmp_path / "data")]
    assert main(arguments) == 1
    assert "valid.tsv:4: 1 columns, expected 9" in capsys.readouterr().err
    assert main([*arguments, "--on-bad-record", "skip", "--max-bad-share", "0.2"]) == 1
    assert "1 of 3 records are bad, more than max_bad_share=0.2" in capsys.readouterr().err
    more = ["--set", "targets=2", "question=So?", "--on-bad-record", "skip", "--max-bad-share", "0.5"]
    assert main([*arguments, *more]) == 0
    out, err = capsys.readouterr()
    assert "skipped 1 of 18 records as bad" in err
    train = load_records(out.strip(), "train")
    assert len(train) == 4 and train[0].messages[0]["content"].startswith("So?\n\n")
    # What was left out stays known: the same command says nothing more, a stricter one does not pass it over.
    assert main([*arguments, *more]) == 0 and capsys.readouterr() == (out, "")
    strict = ["--on-bad-record", "skip", "--max-bad-share", "0.2"]
    for stricter in ([], strict):
        assert main([*arguments, *more[:3], *stricter]) == 1
        message = "prepared without 1 of the 3 records of valid.tsv, which are bad; repair that file and delete"
        assert f"{out.strip()}: {message}" in capsys.readouterr().err
    assert main([*arguments, *more[:3], *strict[:-1], "0.334"]) == 0


def test_two_commands_at_once_write_one_data_set(manual, tmp_path):
    """Both say where it is; only one of them tells of writing it."""
    run = [sys.executable, "-m", "e2p_jax", "prepare", "persona_chat", "--manual-dir", str(manual)]
    both = [
        subprocess.Popen([*run, "--data-dir", str(tmp_path / "data")], stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    out, err = zip(*(process.communicate() for process in both), strict=True)
    assert out[0] == out[1] == f"{tmp_path}/data/persona_chat/self_original/1.0.0\n", err
    assert sum("records: 2 train" in text for text in err) == 1
    assert len(load_records(out[0].strip(), "train")) == 2


@pytest.mark.parametrize(
    ("dataset", "folder", "message"),
    [
        ("pens2", "manual", r"dataset 'pens2': unknown; there are persona_chat, pens, interactions$"),
        (
            "persona_chat/mine",
            "manual",
            r"dataset persona_chat: no configuration 'mine'; there are: persona_chat/self_",
        ),
        ("persona_chat", "nowhere", r"--manual-dir .*nowhere: not a directory"),
    ],
)
def test_prepare_refuses(manual, tmp_path, dataset, folder, message):
    with pytest.raises(UserError, match=message):
        prepare(dataset, tmp_path / folder, tmp_path / "data")


def test_a_half_copied_directory_is_not_taken_for_a_dataset(manual, tmp_path):
    directory = prepare("persona_chat", manual, tmp_path / "data")
    (directory / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"not a prepared dataset; run `e2p prepare`"):
        load_records(str(directory), "train")
    with pytest.raises(UserError, match=r"delete it to prepare it anew"):
        prepare("persona_chat", manual, tmp_path / "data")


def test_records_come_in_order_with_their_place(manual, tmp_path):
    directory = prepare("persona_chat", manual, tmp_path / "data")
    records = load_records(str(directory), "train")
    assert [record.messages[1]["content"] for record in records] == ["hello train", "good day train"]
    assert [record.source for record in records] == [f"{directory} train[0]", f"{directory} train[1]"]
    moved = (tmp_path / "data").rename(tmp_path / "moved") / directory.relative_to(tmp_path / "data")
    assert load_records(str(moved), "train")[1].messages == records[1].messages


def test_records_of_files_and_of_the_generator(tmp_path):
    record = Record("ann", ("i run.",), ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}))
    write_jsonl([record], tmp_path / "own.jsonl")
    (read,) = load_records(str(tmp_path / "own.jsonl"), "train")
    assert (read.user_id, read.messages) == (record.user_id, record.messages)
    assert load_records("synthetic", "validation") == [synthetic.record(user) for user in synthetic.VALIDATION]


def test_load_records_refuses(manual, tmp_path):
    import tensorflow_datasets as tfds

    directory = prepare("persona_chat", manual, tmp_path / "data")
    other = tfds.testing.DummyDataset(data_dir=tmp_path / "other")
    other.download_and_prepare(file_format="array_record")
    (tmp_path / "own.jsonl").write_text("")
    for path, split, message in [
        (tmp_path / "nowhere", "train", r"data.path: .*nowhere does not exist"),
        (manual, "train", r"manual: not a prepared dataset; run `e2p prepare`"),
        (directory, "test", r"no split 'test'; there are train, validation$"),
        (other.data_dir, "train", r"its examples have \['id'\], not .*e2p prepare"),
        (tmp_path / "own.jsonl", "validation", r"own.jsonl: split 'validation' holds no records"),
        ("synthetic", "test", r"synthetic: split 'test' holds no records"),
    ]:
        with pytest.raises(UserError, match=message):
            load_records(str(path), split)


def test_tfds_is_imported_only_for_prepared_directories():
    code = """if True:
        import sys
        from e2p_jax.datasets import prepare
        from e2p_jax.datasets import prepared
        prepared.load_records("synthetic", "validation")
        sys.exit("tensorflow_datasets" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_tensorflow_is_not_needed(manual, tmp_path):
    code = """if True:
        import sys, pathlib
        from e2p_jax.datasets import prepare
        from e2p_jax.datasets import prepared
        directory = prepare.prepare("persona_chat", *map(pathlib.Path, sys.argv[1:]))
        print(len(prepared.load_records(str(directory), "train")), "tensorflow" in sys.modules)
    """
    run = [sys.executable, "-W", "error", "-c", code, str(manual), str(tmp_path / "data")]
    done = subprocess.run(run, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.stdout == "2 False\n", done.stderr
