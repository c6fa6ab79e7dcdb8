"""Preparing datasets and reading records from every place they live in."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import releases

from e2p_jax.cli import main
from e2p_jax.data import synthetic
from e2p_jax.data.dialogue_corpus import generate
from e2p_jax.data.prepare import prepare
from e2p_jax.data.prepared import load_records
from e2p_jax.data.records import Record, write_jsonl
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
        from e2p_jax.data import builder, prepare
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
        ("pens2", "manual", r"dataset 'pens2': unknown; there are persona_chat, .*dialogue_corpus$"),
        (
            "persona_chat/mine",
            "manual",
            r"dataset persona_chat: no configuration 'mine'; there are: persona_chat/self_",
        ),
        ("dialogue_corpus/x", "manual", r"dataset dialogue_corpus: no configuration 'x'; there are: none"),
        ("persona_chat", "nowhere", r"--manual-dir .*nowhere: not a directory"),
        ("dialogue_corpus", "manual", r"self_dialogue.jsonl.gz, .*schema_guided.jsonl.gz: not found"),
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
        from e2p_jax.data import prepare, prepared
        prepared.load_records("synthetic", "validation")
        sys.exit("tensorflow_datasets" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_tensorflow_is_not_needed(manual, tmp_path):
    code = """if True:
        import sys, pathlib
        from e2p_jax.data import prepare, prepared
        directory = prepare.prepare("persona_chat", *map(pathlib.Path, sys.argv[1:]))
        print(len(prepared.load_records(str(directory), "train")), "tensorflow" in sys.modules)
    """
    run = [sys.executable, "-W", "error", "-c", code, str(manual), str(tmp_path / "data")]
    done = subprocess.run(run, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.stdout == "2 False\n", done.stderr


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> tuple[Path, dict[tuple[str, ...], str]]:
    """A small corpus in the true form, its usable dialogues, and a few generated users in place of 16,000."""
    monkeypatch.setattr(synthetic, "PRETRAINING", range(100_000, 100_060))
    monkeypatch.setattr(generate, "SOURCES", {"self_dialogue.jsonl.gz": 1.0, "schema_guided.jsonl.gz": 0.35})
    monkeypatch.setattr(generate, "VALIDATION_SHARE", 0.2)
    directory, usable = tmp_path / "corpus", {}
    directory.mkdir()
    for name in generate.SOURCES:
        lines = []
        for n in range(80):
            turns = [f"{name[:6]} dialogue{n:03d} turn{t} says word{chr(97 + n % 26) * 4}{t}" for t in range(3 + n % 4)]
            if n == 7:
                turns[2] = "  "
            elif len(turns) > 3:
                usable[tuple(turns)] = name
            lines.append(json.dumps({"turns": [f" {turn} " for turn in turns], "topic": "x"}) + "\n")
        (directory / name).write_bytes(gzip.compress("".join(lines).encode()))
    return directory, usable


def test_dialogue_corpus_is_what_its_generator_yields(corpus, tmp_path):
    directory, usable = corpus
    prepared = str(prepare("dialogue_corpus", directory, tmp_path / "data"))
    records = {split: load_records(prepared, split) for split in ("train", "validation")}
    for split, read in records.items():
        made = list(generate.records(directory, split))
        assert [(r.user_id, r.context, r.messages) for r in read] == [(r.user_id, r.context, r.messages) for r in made]
    users = [[record.user_id for record in read] for read in records.values()]
    assert len(users[0]) > 2 * len(users[1]) > 0 and len({*users[0], *users[1]}) == len(users[0]) + len(users[1])
    # All of one source, a part of the other; no short dialogue, none with an empty turn; echoes repeat the user.
    spoken = []
    for record in [*records["train"], *records["validation"]]:
        if record.user_id.startswith("dialogue"):
            turns = tuple(m["content"] for m in record.messages if m["role"] != "system")
            echo = [u for u in usable if turns[::2] == turns[1::2] == u[::2]]
            spoken.append(echo[0] if echo else turns)
            system = [m["content"] for m in record.messages if m["role"] == "system"]
            assert system == (["\n".join(record.context)] if record.context else [])
    assert set(spoken) <= usable.keys() and len(spoken) == len(set(spoken))
    shares = [sum(usable[turns] == name for turns in spoken) for name in generate.SOURCES]
    assert shares[0] == sum(name == "self_dialogue.jsonl.gz" for name in usable.values())
    assert 0 < shares[1] < 0.6 * shares[0]
    assert len(users[0]) + len(users[1]) == len(spoken) + 60


def closed(text: str) -> str:
    """Without the spaces before punctuation."""
    return re.sub(r" ([.,!?;])", r"\1", text)


def test_generated_personas_show_their_context(corpus):
    directory, _ = corpus
    forms = {"none": 0, "sentences": 0, "words": 0}
    for record in generate.records(directory, "train"):
        if record.user_id.startswith("user-"):
            user = int(record.user_id.removeprefix("user-"))
            if record.messages[0]["role"] != "system":
                forms["none"] += 1
            elif sorted(map(closed, record.context)) == sorted(synthetic.record(user).context):
                forms["sentences"] += 1
                assert record.messages[0]["content"] == "\n".join(record.context)
            else:
                forms["words"] += 1
                assert record.messages[0]["content"] == " ".join(synthetic.traits(user).values())
            assert closed(record.messages[-1]["content"]) == synthetic.record(user).messages[-1]["content"]
    assert min(forms.values()) > 0


def test_some_records_space_their_punctuation_throughout(corpus):
    directory, _ = corpus
    spaced = closed_up = 0
    for record in generate.records(directory, "train"):
        if record.user_id.startswith("user-"):
            texts = [message["content"] for message in record.messages]
            marks = [re.findall(r"( ?)[.,!?]", text) for text in texts]
            assert len({mark for found in marks for mark in found}) == 1
            spaced += marks[-1][0] == " "
            closed_up += marks[-1][0] == ""
    assert spaced > 0 and closed_up > 0
