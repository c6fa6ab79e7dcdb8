"""`e2p compare`: every baseline through one mask and one loop, resumable, on the same targets."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.baselines import ARMS, BASELINES
from e2p_jax.cli import main
from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, TrainConfig
from e2p_jax.data.structure import Structure
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.evaluate import compare as comparison
from e2p_jax.evaluate.compare import compare
from e2p_jax.prefix import mlp
from e2p_jax.report.collect import find_source
from e2p_jax.train.partition import split
from e2p_jax.train.run import open_run
from e2p_jax.vectors.table import save_table

USERS = range(80)


@pytest.fixture(scope="module")
def config(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("compared")
    write_jsonl([synthetic.record(user) for user in USERS], folder / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="synthetic", version="1")
    return Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(path=str(folder / "records.jsonl"), embeddings=str(folder / "table"), seq_len=256),
        projector=mlp.Settings(hidden_size=16),
        train=TrainConfig(steps=4, rows=4, warmup_steps=1, eval_every=2, checkpoint_every=2),
        evaluate=EvaluateConfig(measures=("ranking",), candidates=3, max_records=3, bootstrap_samples=20),
    )


def test_the_whole_table_and_its_parts_again(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "config.json"
    path.write_text(config.change(evaluate={"measures": ()}).to_json())
    command = ["compare", str(path), "--workdir", str(tmp_path / "compared"), "--json", "--conditions"]
    read: list[str] = []
    reader = Checkpoint.pieces
    monkeypatch.setattr(Checkpoint, "pieces", lambda self, path, *more: read.append(path) or reader(self, path, *more))
    assert main([*command, *ARMS]) == 0
    # The four that leave it frozen share one; `full` trains its own, and is opened without what it trained from.
    assert read.count("embedding") == 3
    table = json.loads(capsys.readouterr().out)["splits"][0]
    rows = table["conditions"]
    assert list(rows) == list(ARMS)
    assert len({row["nll_per_target"] for row in rows.values()}) == len(ARMS)  # every condition is another
    assert json.loads((tmp_path / "compared" / "report" / "evaluation.json").read_text())["splits"][0] == table
    assert {p.name for p in (tmp_path / "compared").iterdir()} == {*BASELINES, "scores", "report"}

    source = find_source(tmp_path / "compared")  # as `e2p report` reads it
    assert set(source.runs) == {f"compared/{name}" for name in BASELINES} and source.splits == [table]

    # A part of it again: nothing is trained or scored anew.
    def refuse(*args: object) -> None:
        raise AssertionError("scored again")

    trained = {run: (tmp_path / "compared" / run / "metrics.jsonl").read_text() for run in ("e2p", "static")}
    monkeypatch.setattr(comparison, "evaluate", refuse)
    assert table["share"]["gain"]["value"] == pytest.approx(-rows["e2p"]["minus_shuffled"]["mean"])
    runs = ["none", "e2p", "text", "text+shuffled", "shuffled", "mean", "zero", "noise", "extreme", "static"]
    assert main([*command, *runs]) == 0
    again = json.loads(capsys.readouterr().out)["splits"][0]["conditions"]
    assert again == {name: rows[name] for name in runs}
    for run, metrics in trained.items():
        assert (tmp_path / "compared" / run / "metrics.jsonl").read_text() == metrics

    counts = {}
    for name in BASELINES:
        opened = open_run(tmp_path / "compared" / name)
        trainable, _ = split(opened.model.params, opened.model.mask)
        counts[name] = {part for part, tree in trainable.items() if jax.tree.leaves(tree)}
    assert counts == {
        "e2p": {"projector"},
        "e2p+text": {"projector"},
        "static": {"projector"},
        "lora": {"lora"},
        "full": {"backbone"},
    }


def test_several_seeds(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A run each, and the mean of what they say of each record: of one user's words, not of twice as many users."""
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    command = ["compare", str(path), "--workdir", str(tmp_path / "both"), "--conditions", "none", "shuffled", "e2p"]
    assert main([*command, "--seeds", "3", "4", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    (table,), (one,), (other,) = values["splits"], values["seeds"]["3"], values["seeds"]["4"]
    assert (tmp_path / "both" / "seed-4" / "e2p" / "metrics.jsonl").is_file()
    assert len({split["conditions"]["none"]["nll_per_target"] for split in (one, other, table)}) == 1
    a, b, both = (split["conditions"]["e2p"] for split in (one, other, table))
    assert a["nll_per_target"] != b["nll_per_target"]
    assert both["nll_per_target"] == pytest.approx((a["nll_per_target"] + b["nll_per_target"]) / 2)
    ranks = [row["measures"]["mrr"]["value"] for row in (a, b, both)]
    assert ranks[2] == pytest.approx((ranks[0] + ranks[1]) / 2)
    means = [row["minus_shuffled"]["mean"] for row in (a, b, both)]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2)
    assert table["users"] == one["users"] and table["targets"] == one["targets"]

    assert main([*command, "--seeds", "3", "4"]) == 0
    shown = capsys.readouterr().out
    assert "minus shuffled, by seed" in shown and f"{b['nll_per_target']:.4f} {means[1]:+.4f}" in shown
    source = find_source(tmp_path / "both")  # as `e2p report` reads it
    assert set(source.runs) == {"both/seed-3/e2p", "both/seed-4/e2p"} and source.splits == [table]


def test_prompt_tuning_is_one_token_for_all(config: Config, tmp_path: Path):
    """The static token is its bias: no user, no vector and no table changes it."""
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, measures=("texts",)))
    (evaluation,), (again,) = (compare(config, tmp_path, ["static"]) for _ in range(2))
    assert len(evaluation.scores["static"].replies) == 3
    assert again.scores["static"].replies == evaluation.scores["static"].replies
    run = open_run(tmp_path / "static")
    projector = nnx.merge(run.model.graph, run.model.params).projector
    token = projector(run.population.mean[None])[0]
    expected = projector.token_mean[...] + projector.token_std[...] * projector.bias[...]
    np.testing.assert_allclose(token[0], expected, atol=1e-6)
    assert np.abs(projector.bias[...]).max() > 0


def test_scores_are_reused_only_while_all_they_depend_on_stays(config: Config, tmp_path: Path):
    """A changed table of vectors is measured anew, as `evaluate` measures it, and so is whatever else has a say."""
    folder = Path(config.data.path).parent
    shutil.copytree(folder / "table", tmp_path / "table")
    data = dataclasses.replace(config.data, embeddings=str(tmp_path / "table"))
    config = dataclasses.replace(config, data=data, evaluate=dataclasses.replace(config.evaluate, measures=()))
    (first,) = compare(config, tmp_path / "compared", ["e2p"])
    before, vectors = (tmp_path / "table" / "embeddings.npy").stat(), np.load(tmp_path / "table" / "embeddings.npy")
    held_out = sorted({int(record.user_id.removeprefix("user-")) for record in first.records})
    vectors[held_out] = vectors[held_out[::-1]]  # nobody trained on them
    np.save(tmp_path / "table" / "embeddings.npy", vectors)
    os.utime(tmp_path / "table" / "embeddings.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    (second,) = compare(config, tmp_path / "compared", ["e2p"])
    run = open_run(tmp_path / "compared" / "e2p")
    expected = comparison.evaluate(run, second.records, "validation", ["e2p"]).scores["e2p"].nll
    assert not np.array_equal(second.scores["e2p"].nll, first.scores["e2p"].nll)
    np.testing.assert_array_equal(second.scores["e2p"].nll, expected)

    path = tmp_path / "compared" / "scores" / "e2p.npz"
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:80] + b"\xff\x00\xff" + whole[83:], b"5"):
        path.write_bytes(damaged)
        (again,) = compare(config, tmp_path / "compared", ["e2p"])
        np.testing.assert_array_equal(again.scores["e2p"].nll, expected)

    splits = {"validation": second.records}

    def key(run: Any, splits: Any = splits, conditions: Any = ("e2p",)) -> str:
        return comparison._key(run, splits, list(conditions))

    def with_inputs(**changes: Any) -> Any:
        return dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, **changes))

    encoder, decoder = run.inputs.encoder, run.inputs.decoder
    one = dataclasses.replace(second.records[0], context=("other",))
    evaluate = dataclasses.replace(run.inputs.config.evaluate, max_records=1)
    fewer = with_inputs(config=run.inputs.config.change(evaluate={"derangements": 2}))
    other = Structure(encoder.tokenizer, encoder.template + " ", "another template")
    changed = [
        key(run),
        key(with_inputs(encoder=dataclasses.replace(encoder, stops=()))),
        key(run, conditions=("e2p", "shuffled")),
        key(fewer, conditions=("e2p", "shuffled")),
        key(run, conditions=("e2p", "text+shuffled")),
        key(fewer, conditions=("e2p", "text+shuffled")),
        key(run, {"test": second.records}),
        key(run, {"validation": [one, *second.records[1:]]}),
        key(dataclasses.replace(run, model=dataclasses.replace(run.model, fingerprint="f" * 64))),
        key(with_inputs(decoder=dataclasses.replace(decoder, norm_epsilon=0.1))),
        key(with_inputs(encoder=dataclasses.replace(encoder, structure=other))),
        key(with_inputs(config=dataclasses.replace(run.inputs.config, evaluate=evaluate))),
        key(with_inputs(config=dataclasses.replace(run.inputs.config, data=dataclasses.replace(data, targets="all")))),
        key(dataclasses.replace(run, step=run.step - 2)),
    ]
    assert len(set(changed)) == len(changed)
    assert key(run, conditions=["none"]) == key(with_inputs(table=None), conditions=["none"])
    assert key(run, conditions=["extreme"]) != key(with_inputs(table=None), conditions=["extreme"])
    assert key(run) == key(fewer)
    assert key(run, conditions=["e2p", "shuffled"]) == key(run, conditions=["shuffled", "e2p"])


def test_script_of_the_papers_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Every comparison that it would run has flags that `e2p compare` knows: it ends at the missing backbone."""
    script = Path(__file__).parents[2] / "benchmarks" / "paper.sh"
    arguments = [str(tmp_path / "missing"), "chat", "news", "encoder", str(tmp_path), "--train.steps", "70"]
    found = subprocess.run(["bash", script, "--dry-run", *arguments], capture_output=True, text=True, check=True)
    commands = [line.split()[1:] for line in found.stdout.splitlines()]
    assert [command[0] for command in commands] == ["prepare", "embed"] * 2 + ["compare", "report"] * 2
    for command in commands[4::2]:
        assert command[-2:] == ["--train.steps", "70"]
        assert main(command) == 1
        assert "no such directory" in capsys.readouterr().err
