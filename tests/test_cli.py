"""The command line end to end on a tiny backbone, and every mistake a user can make: one line, exit 1 or 2."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.cli import commands_of, main, set_environment
from e2p_jax.commands.common import damaged_programs_removed
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.vectors.table import save_table

USERS = range(30)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """records.jsonl of 30 users without splits, and their table."""
    folder = tmp_path_factory.mktemp("place")
    write_jsonl([synthetic.record(user) for user in USERS], folder / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="synthetic", version="1")
    return folder


def train_arguments(place: Path, backbone: Path, workdir: Path, *more: str) -> list[str]:
    paths = ["--backbone.path", backbone, "--data.path", place / "records.jsonl", "--data.embeddings", place / "table"]
    small = "--data.seq_len 128 --train.rows 4 --train.steps 4 --train.warmup_steps 1 --projector.hidden_size 16"
    quiet = "--train.eval_every 2 --train.checkpoint_every 2"
    return ["train", "persona_chat", "--workdir", str(workdir), *map(str, paths), *small.split(), *quiet.split(), *more]


@pytest.fixture(scope="module")
def run(place: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One's own data in place of a shipped config's."""
    workdir, read, reader = tmp_path_factory.mktemp("runs") / "run", [], Checkpoint.pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "pieces", lambda self, path, *more: read.append(path) or reader(self, path, *more))
        assert main(train_arguments(place, tiny_backbone, workdir)) == 0
    assert read.count("embedding") == 1  # what was trained in front of is evaluated in front of
    return workdir


def test_run_directory_holds_what_the_contract_says(run: Path):
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["steps"] == 4 and Path(config["backbone"]["path"]).is_absolute()
    assert (run / "metrics.jsonl").is_file() and list((run / "tensorboard").iterdir())
    assert (run / "checkpoints" / "4").is_dir() and (run / "chat_template.jinja").is_file()
    report = json.loads((run / "report" / "evaluation.json").read_text())
    assert set(report["splits"][0]["conditions"]) == {"none", "shuffled", "e2p", "text"}
    assert (run / "report" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_run_is_left_as_it_is(run: Path, place: Path, tiny_backbone: Path):
    before = (run / "metrics.jsonl").read_text()
    assert main(train_arguments(place, tiny_backbone, run)) == 0
    assert (run / "metrics.jsonl").read_text() == before


def test_evaluate_fields_change_what_training_shows(
    place: Path, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def shown(name: str, *more: str) -> tuple[dict, str]:
        capsys.readouterr()
        assert main(train_arguments(place, tiny_backbone, tmp_path / name, *more)) == 0
        report = json.loads((tmp_path / name / "report" / "evaluation.json").read_text())
        return report["splits"][0]["conditions"], capsys.readouterr().out

    two = ["--evaluate.conditions", "none", "text", "--evaluate.prompts"]
    plain, _ = shown("plain", *two, "hello there!")
    assert set(plain) == {"none", "text"}
    fewer, answers = shown("fewer", *two, "what is new?", "--evaluate.bootstrap_samples", "3")
    assert "what is new?" in answers and "hello there!" not in answers
    assert fewer["text"]["nll_per_target"] == plain["text"]["nll_per_target"]
    assert fewer["text"]["minus_none"]["low"] != plain["text"]["minus_none"]["low"]
    framed, _ = shown("framed", *two, "hello there!", "--data.context_prompt", "You are: {context}")
    assert framed["text"]["nll_per_target"] != plain["text"]["nll_per_target"]


def test_measures_beside_likelihood(run: Path, capsys: pytest.CaptureFixture[str]):
    """Each kind adds its own columns; candidates and the number of records are the config's."""
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["data"]["eval_splits"] = ["all"]

    def measured(*kinds: str, **fields: int) -> dict:
        config["evaluate"] |= fields
        path.write_text(json.dumps(config))
        capsys.readouterr()
        assert main(["evaluate", str(run), "--conditions", "e2p", "none", "--measures", *kinds, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["splits"][0]["conditions"]

    before = path.read_text()
    try:
        few = measured("ranking", "users", "texts", candidates=3, max_records=4)
        own, none = few["e2p"]["measures"], few["none"]["measures"]
        assert {"mrr", "hits@1", "user_rank", "bleu", "rougeL", "f1", "distinct1", "bits_per_byte"} <= own.keys()
        assert "user_rank" not in none and 1 <= own["user_rank"]["value"] <= 3
        assert own["mrr"].keys() == {"value", "low", "high", "minus_none"} and own["mrr"]["minus_none"]["p"] > 0
        assert own["hits@1"]["value"] in (0, 25, 50, 75, 100)
        assert "bleu" not in measured("ranking", candidates=3, max_records=4)["e2p"]["measures"]
        more = measured("ranking", candidates=10, max_records=0)["e2p"]["measures"]
        assert more["mrr"]["value"] < own["mrr"]["value"]
    finally:
        path.write_text(before)


def test_evaluate_per_example(run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "scores.jsonl"
    arguments = ["evaluate", str(run), "--data", str(place / "records.jsonl"), "--per-example", str(out), "--json"]
    conditions = ("e2p", "none", "shuffled")
    assert main([*arguments, "--conditions", *conditions, "--derangements", "2"]) == 0
    shown = capsys.readouterr()
    assert "shuffled 2" in shown.err and "shuffled 3" not in shown.err
    table = json.loads(shown.out)["splits"][0]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["user_id"] for line in lines] == [f"user-{user}" for user in USERS] * 3
    assert all(set(line) == {"user_id", "nll", "target_tokens", "condition"} for line in lines)
    for condition in conditions:
        mine = [line for line in lines if line["condition"] == condition]
        mean = sum(line["nll"] for line in mine) / sum(line["target_tokens"] for line in mine)
        assert mean == pytest.approx(table["conditions"][condition]["nll_per_target"])


def test_generate_for_users_and_vectors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.save(tmp_path / "vector.npy", synthetic.vector(3))
    asked = ["--prompt", "do you have any pets?", "--max-new-tokens", "8", "--json"]
    vector = f"@{tmp_path / 'vector.npy'}"
    assert main(["generate", str(run), "--user", "user-3", "user-4", vector, *asked]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["user_id"] for answer in answers] == ["user-3", "user-4", vector]
    assert answers[0]["response"] == answers[2]["response"]
    np.savez(tmp_path / "vectors.npz", synthetic.vector(3))
    assert main(["generate", str(run), "--user", f"@{tmp_path / 'vectors.npz'}", *asked]) == 1
    assert "vectors.npz: unreadable" in capsys.readouterr().err
    assert main(["generate", str(run), "--user", "@alice", *asked]) == 1
    assert "alice does not exist" in (said := capsys.readouterr().err) and "'@@alice'" in said
    (tmp_path / "prompts.jsonl").write_text('{"user_id": "user-4", "prompt": "do you have any pets?"}\n')
    assert main(["generate", str(run), "--input", str(tmp_path / "prompts.jsonl"), *asked[2:]]) == 0
    assert json.loads(capsys.readouterr().out)["response"] == answers[1]["response"]


def test_at_sign_means_a_file_on_the_command_line_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In a table and in a file of prompts `@alice` is a user like others."""
    save_table(
        tmp_path / "t", ["@alice", "bob"], np.stack([synthetic.vector(u) for u in (3, 4)]), name="n", version="1"
    )
    np.save(tmp_path / "vector.npy", synthetic.vector(3))
    asked = ["generate", str(run), "--embeddings", str(tmp_path / "t"), "--max-new-tokens", "8", "--json"]
    prompt = "do you have any pets?"
    assert main([*asked, "--user", "@@alice", f"@{tmp_path / 'vector.npy'}", "--prompt", prompt]) == 0
    alice, file = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert alice["user_id"] == "@alice" and alice["response"] == file["response"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"user_id": "@alice", "prompt": prompt}))
    assert main([*asked, "--input", str(tmp_path / "p.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out) == alice
    (tmp_path / "p.jsonl").write_text(json.dumps({"user_id": f"@{tmp_path / 'vector.npy'}", "prompt": prompt}))
    assert main([*asked, "--input", str(tmp_path / "p.jsonl")]) == 1
    assert re.search(r"p\.jsonl:1: user '@.*' has no vector in", capsys.readouterr().err)


def test_export_of_the_backbone(run: Path, tiny_backbone: Path, tmp_path: Path):
    from safetensors.numpy import load_file

    assert main(["export", str(run), "--format", "backbone", "--out", str(tmp_path / "out")]) == 0
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "out", tiny_backbone))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("command", [*(c for c in commands_of([]) if c != "data"), "data stats", "data show"])
def test_help_documents_every_flag(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    flags = re.split(r"^ +(?=--?[a-z])", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    for flag in flags:  # the flag and its values, two spaces or a new line, what it means, its default
        meaning = re.split(r"  +|\n", flag, maxsplit=1)[1]
        assert re.match(r"(\s*\.\.\.\]+)?\s*\w", re.split(r"\((?:default|required|optional)", meaning)[0]), flag
    assert len(flags) > 1


def test_a_reader_who_leaves_early_is_no_error():
    command = f"{sys.executable} -m e2p_jax train quickstart --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("usage") and done.returncode in (0, 1) and not done.stderr


def lines_of(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "records.jsonl").read_text().splitlines()]


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


CONFIGS = """
import dataclasses
from e2p_jax.config import Config, DataConfig, TrainConfig
config = Config(data=DataConfig(path="nowhere.jsonl"), train=TrainConfig(steps=77))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "train mine.py --workdir run",
        "train --workdir run mine.py",
        "train --workdir run mine.py --train.rows 4",
        "train --evaluate.conditions none text --workdir run mine.py",
        "compare --conditions none --workdir run mine.py",
        "data stats --json mine.py",
        "data --rows 2 show mine.py",
    ],
)
def test_the_config_is_found_wherever_it_stands(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CONFIGS)
    assert main(arguments.split()) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err  # not the default, which trains
    with pytest.raises(SystemExit):
        main([*arguments.split(), "--help"])
    assert re.search(r"--train\.steps INT\s.*?default: 77\)", capsys.readouterr().out, re.DOTALL)


def test_help_of_plan_shows_the_named_config(capsys: pytest.CaptureFixture[str]):
    for arguments in ("plan llama_8b --help", "plan --topology v5e:4x4 llama_8b --help"):
        with pytest.raises(SystemExit):
            main(arguments.split())
        assert "default: meta-llama/Llama-3.1-8B" in " ".join(capsys.readouterr().out.split())


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


def test_data_cannot_act_on_a_terminal(run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Ids, texts and file names with escape sequences, carriage returns and marks that turn text around."""
    active = "\x1b]0;owned\x07\x1b[2J\x9b\u202e[/red] :smile:"
    shown = r"\x1b]0;owned\x07\x1b[2J\x9b\u202e[/red] :smile:"
    vector = tmp_path / f"{active.replace('/', '')}.npy"
    np.save(vector, synthetic.vector(3))
    asked = ["--prompt", "do you have any pets?", "--max-new-tokens", "2"]
    assert main(["generate", str(run), "--user", f"@{vector}", *asked]) == 0
    assert shown.replace("/", "") in capsys.readouterr().out
    assert main(["generate", str(run), "--user", active, *asked]) == 1
    assert shown in capsys.readouterr().err
    records = lines_of(place)
    for user, record in zip(USERS, records, strict=True):
        record["user_id"] = f"{active}{user}"
        record["messages"] = [{"role": role, "content": active} for role in ("user", "assistant")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    ids = [record["user_id"] for record in records]
    save_table(tmp_path / "table", ids, vectors, name="synthetic", version="1")
    paths = ["--data.path", str(tmp_path / "data.jsonl"), "--data.embeddings", str(tmp_path / "table")]
    assert main(["data", "show", "quickstart", *paths]) == 0
    seen = capsys.readouterr()
    assert f"user {shown}" in seen.out and shown.lower() in seen.out  # an id; a text, as the tokenizer has it
    assert not set("\x1b\x07\x9b\u202e") & set(seen.out + seen.err)


def test_unknown_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"train": {"stepz": 3}}')
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert "train.stepz" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, e2p_jax.cli; print([m for m in ('jax', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("given", [None, "", "/elsewhere"])
def test_compiled_steps_are_kept_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if given is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    set_environment("train")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == ("/cache/e2p_jax" if given is None else given)


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


@pytest.mark.filterwarnings("default:Error reading persistent compilation cache entry")
def test_a_damaged_program_is_compiled_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What a kill or a full disk left of a file that JAX writes in place, and never over."""
    compilation_cache.reset_cache()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}

    def compile_in_a_new_process() -> None:
        jax.clear_caches()
        with damaged_programs_removed():
            jax.jit(lambda x: x + 1)(jnp.ones(3))

    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        compile_in_a_new_process()
        (program,) = tmp_path.glob("jit__lambda-*-cache")
        program.write_bytes(program.read_bytes()[:100])
        compile_in_a_new_process()
        told = f"{tmp_path}: the compiled program jit__lambda was damaged; it is compiled and kept anew\n"
        assert capsys.readouterr().err == told and program.stat().st_size > 100
        compile_in_a_new_process()
        assert capsys.readouterr().err == ""
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.filterwarnings("always:Error reading persistent")
def test_compiled_programs_without_a_place_are_told_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a home that is not there, or can only be read: nothing was damaged, and nothing is kept."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "absent"))
    with damaged_programs_removed():
        for name in ("jit_a", "jit_b"):
            warnings.warn(
                f"Error reading persistent compilation cache entry for '{name}': PermissionError", stacklevel=1
            )
    said = capsys.readouterr().err
    assert said.count("cannot be written; set JAX_COMPILATION_CACHE_DIR") == 1 and "damaged" not in said
