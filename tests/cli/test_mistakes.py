"""Every mistake a user can make is one line and exit 1 or 2."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from arguments import USERS, lines_of, train_arguments

from e2p_jax.cli import main
from e2p_jax.datasets import synthetic
from e2p_jax.vectors.table import save_table


def broken(place: Path, folder: Path, fault: str) -> Path:
    """A copy of the place with one fault."""
    shutil.copytree(place, folder)
    records, vectors = lines_of(folder), np.load(folder / "table" / "embeddings.npy")
    text = None
    if fault == "missing vector":
        records[7]["user_id"] = "stranger"
    elif fault == "nan":
        vectors[7, 3] = np.nan
    elif fault == "wrong width":
        vectors = vectors[:, :10]
    elif fault == "empty dialogue":
        records[7]["messages"] = []
    elif fault == "no assistant turn":
        records[7]["messages"] = records[7]["messages"][:1]
    elif fault == "too long":
        records[7]["messages"][-1]["content"] = "word " * 200
    elif fault == "malformed line":
        text = (folder / "records.jsonl").read_text().replace('{"user_id": "user-7"', '{"user_id" "user-7"')
    (folder / "records.jsonl").write_text(text or "".join(json.dumps(r) + "\n" for r in records))
    np.save(folder / "table" / "embeddings.npy", vectors)
    return folder


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("missing vector", ["records.jsonl:8", "stranger"]),
        ("nan", ["row 7", "user-7"]),
        ("wrong width", ["table", "width 64"]),
        ("empty dialogue", ["records.jsonl:8", "empty dialogue"]),
        ("no assistant turn", ["records.jsonl:8", "assistant"]),
        ("too long", ["records.jsonl:8", "data.seq_len=128"]),
        ("malformed line", ["records.jsonl:8", "malformed JSON"]),
    ],
)
def test_bad_data_is_one_line(
    place: Path, tiny_backbone: Path, tmp_path: Path, fault: str, names: list[str], capsys: pytest.CaptureFixture[str]
):
    folder = broken(place, tmp_path / "broken", fault)
    assert main(train_arguments(folder, tiny_backbone, tmp_path / "run")) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(name in message for name in names), message
    assert not (tmp_path / "run").exists()


def test_bad_backbones_are_one_line(
    place: Path, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cut = tmp_path / "cut"
    shutil.copytree(tiny_backbone, cut)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    other = tmp_path / "other"
    shutil.copytree(tiny_backbone, other)
    config = json.loads((other / "config.json").read_text()) | {"vocab_size": 100}
    (other / "config.json").write_text(json.dumps(config))
    nowhere = tmp_path / "nowhere"
    for backbone, word in ((cut, "damaged safetensors"), (other, "vocab_size 100"), (nowhere, "no such directory")):
        assert main(train_arguments(place, backbone, tmp_path / "run")) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and word in message and str(backbone) in message, message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.seq_len", "100"], "data.seq_len"),
        (["--train.trainable", "projector/nothing"], "projector/nothing"),
        (["--mesh.fsdp", "3"], "mesh.fsdp=3"),
        (["--train.rows", "3"], "train.rows=3"),
        (["--data.too_long", "refuse", "--data.context_prompt", "none"], "data.context_prompt"),
        (["--data.eval_splits", "test"], "'test'"),
        (["--data.chat_template", "missing.jinja"], "missing.jinja"),
        (["--backbone.revision", "main", "--backbone.path", "nobody/nothing"], "nobody/nothing"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line(
    place: Path, tiny_backbone: Path, tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert main(train_arguments(place, tiny_backbone, tmp_path / "run", *more)) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message, message


def test_what_cannot_be_shown_is_refused_before_training(
    place: Path, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Nobody to draw another user from, and too few replies to rank among: not once the run is trained."""
    records, folder = lines_of(place), tmp_path / "few"
    folder.mkdir()
    for record in records:
        record["split"] = "validation" if record["user_id"] in ("user-1", "user-2") else "train"
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    known = [n for n in USERS if n != 2]
    vectors = np.stack([synthetic.vector(user) for user in known])
    save_table(folder / "table", [f"user-{user}" for user in known], vectors, name="synthetic", version="1")
    null = ["--data.missing_user", "null", "--train.null_user_rate", "0.1"]
    null += ["--data.eval_splits", "validation"]
    ranking = ["--evaluate.conditions", "none", "--evaluate.measures", "ranking"]
    for more, words in (([], "the split has 1; leave them out"), (ranking, "evaluate.candidates")):
        run = tmp_path / "run"
        assert main(train_arguments(folder, tiny_backbone, run, *null, *more)) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and words in message and not run.exists(), message


PLAN = "plan quickstart --topology cpu:1"
ASK = "generate nowhere --user a --prompt b"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("fly", "fly"),
        ("train quickstart --train.step x", "--train.step"),
        ("train quickstart --train.steps x", "--train.steps"),
        ("train", "Name of a shipped config"),
        ("train --workdir x", "Name of a shipped config"),
        ("train quickstart persona_chat", "persona_chat"),
        ("train --workdir x quickstart persona_chat", "persona_chat"),
        ("train nonesuch", "shipped configs: backbone"),
        ("train --workdir x nonesuch", "shipped configs: backbone"),
        ("plan --topology v5e:4x4 nonesuch", "shipped configs: backbone"),
        ("data stats --json nonesuch", "shipped configs: backbone"),
        ("compare --workdir x nonesuch", "shipped configs: backbone"),
        ("compare quickstart --seeds 1 -1", "--seeds"),
        ("compare quickstart --seeds 1 1", "--seeds"),
        (f"{PLAN} --embedding-width 0", "--embedding-width"),
        (f"{PLAN} --targets -1", "--targets"),
        ("data show quickstart -n 0", "--rows"),
        (f"{ASK} --temperature nan", "--temperature"),
        (f"{ASK} --temperature inf", "--temperature"),
        (f"{ASK} --top-p nan", "--top-p"),
        (f"{ASK} --seed -1", "--seed"),
        (f"{ASK} --max-new-tokens -1", "--max-new-tokens"),
        ("drift nowhere --old a --new b --keep nan", "--keep"),
        ("demo nowhere --port 70000", "--port"),
        ("embed --data a --encoder als --out b --width 0", "--width"),
        ("train quickstart --start-timeout 0", "--start-timeout"),
        ("train quickstart --num-processes 0", "--num-processes"),
        ("train|quickstart|--workdir|", "argument 4, after --workdir, is empty"),
        ("train|quickstart|--workdir=", "argument 3, after --workdir, is empty"),
        ("train|", "argument 2, after train, is empty"),
        ("evaluate|nowhere|--data|\udcff.jsonl", "argument 4, '\\udcff.jsonl', is not UTF-8"),
    ],
)
def test_usage_errors_exit_with_2(arguments: str, words: str, capsys: pytest.CaptureFixture[str]):
    try:
        code: object = main(arguments.split("|" if "|" in arguments else None))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and words in said, said


@pytest.mark.parametrize(
    ("arguments", "streams", "code"),
    [
        ("--help", ">&-", 0),
        ("train --help", "2>&-", 0),
        ("train nonesuch", "<&- >&- 2>&-", 2),
        ("--help", ">/dev/full", 1),
    ],
)
def test_closed_streams_are_no_traceback(arguments: str, streams: str, code: int):
    command = f"{sys.executable} -m e2p_jax {arguments} {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == code and done.stderr.count("\n") <= 1 and "Traceback" not in done.stderr, done.stderr


def test_names_too_long_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments in (
        ["convert", "embedded", "--out", str(tmp_path / ("x" * 5000))],
        ["evaluate", "x" * 100_000],
        ["train", "quickstart", "--data.path", "x" * 100_000],
    ):
        assert main(arguments) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and len(message) < 5000, message


def test_unknown_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"train": {"stepz": 3}}')
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert "train.stepz" in capsys.readouterr().err


def test_too_many_open_files_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever is made of the file that could not be opened: here it would be called damaged."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    arguments = ["embed", "--data", str(place / "table"), "--encoder", "import", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0  # all that it imports is imported
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        for descriptor in held:
            os.close(descriptor)
    told = (
        r"e2p: too many open files: 64 are allowed here; allow more \(`ulimit -n 4096`\) and run the same command again"
    )
    assert re.fullmatch(told, capsys.readouterr().err.strip())
    assert main(arguments) == 0
