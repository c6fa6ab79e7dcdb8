"""The command line end to end on a tiny backbone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from arguments import USERS, lines_of, train_arguments

from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.cli import main
from e2p_jax.datasets import synthetic
from e2p_jax.vectors.table import save_table


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
    assert all(set(line) == {"user_id", "nll", "target_tokens", "condition", "split"} for line in lines)
    assert {line["split"] for line in lines} == {"all"}
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
