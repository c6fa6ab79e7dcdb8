"""An exported directory becomes a run again, and training goes on from its weights."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from gguf import GGMLQuantizationType
from gguf_writer import write_model

from e2p_jax.cli import main
from e2p_jax.datasets.prepared import load_records
from e2p_jax.errors import UserError
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.evaluate.generate import vectors_for
from e2p_jax.export.import_back import import_transformers
from e2p_jax.export.transformers import export_transformers
from e2p_jax.train.loop import train
from e2p_jax.train.run import Run, open_run


def same_projector(one: Run, other: Run) -> bool:
    a, b = (run.model.params["projector"] for run in (one, other))
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def scores(run: Run) -> np.ndarray:
    records = load_records(run.inputs.config.data.path, "all")[:6]
    return evaluate(run, records, "all", ["e2p"]).scores["e2p"].nll


def places(run: Run) -> dict[str, str]:
    """Where the data of a run is, which its export does not say."""
    data = run.inputs.config.data
    return {"data": data.path, "embeddings": str(data.embeddings)}


@pytest.mark.parametrize("include_backbone", [True, False])
@pytest.mark.parametrize("way", [("after_bos", 3, "linear"), ("in_chat", 1, "mlp")], ids=str)
def test_imported_run_is_the_exported_one(make_run: Callable, tmp_path: Path, way: tuple, include_backbone: bool):
    run = make_run(*way)
    export_transformers(run, tmp_path / "exported", include_backbone)
    import_transformers(tmp_path / "exported", tmp_path / "run", **places(run))
    again = open_run(tmp_path / "run")
    assert again.step == 0 and same_projector(run, again)
    assert again.model.fingerprint == run.model.fingerprint
    assert again.inputs.encoder.template == run.inputs.encoder.template
    assert again.inputs.config.train == run.inputs.config.train
    assert (tmp_path / "run" / "backbone").is_dir() == include_backbone
    assert np.array_equal(scores(again), scores(run))


def test_training_goes_on(make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By the command that the import prints, after the steps in config.json were raised.

    From the exported projector; the optimizer, its warm-up and the order of the data begin afresh (docs/export.md).
    """
    run = make_run()
    export_transformers(run, tmp_path / "exported", include_backbone=True)
    flags = [word for name, place in places(run).items() for word in (f"--{name}", place)]
    assert main(["import", str(tmp_path / "exported"), "--out", str(tmp_path / "run"), *flags]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "run")
    command = said.err.strip().split("e2p ")[1].split()
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    assert config["train"]["steps"] == 3
    config["train"] |= {"steps": 20, "eval_every": 1}
    path.write_text(json.dumps(config))
    assert main(command) == 0
    trained = open_run(tmp_path / "run", "last")
    assert trained.step == 20 and not same_projector(run, trained)
    kept, began = (each.model.params["projector"]["token_mean"] for each in (run, trained))
    assert np.array_equal(kept, began)
    old, new = (logged(each.directory, "eval/validation/nll") for each in (run, trained))
    assert sorted(new) == list(range(1, 21)) and sorted(old) == [3]
    assert new[1] == pytest.approx(old[3], abs=1e-6)  # the first step of a warm-up has learning rate 0
    losses = logged(trained.directory, "train/loss")
    assert losses[20] < losses[1] - 0.1  # of what it learns: two users kept apart may fare worse for a while


def logged(run: Path, name: str) -> dict[int, float]:
    """Step -> value of a metric."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_without_its_data_it_answers_and_says_what_is_missing(
    make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run = make_run()
    export_transformers(run, Path("exported"), include_backbone=True)
    assert main(["import", "exported", "--out", "run"]) == 0
    assert "import again with --embeddings TABLE" in capsys.readouterr().err
    np.save("vector.npy", vectors_for(run, ["user-1"], [""], "e2p")[0])
    assert main(["generate", "run", "--user", "@vector.npy", "--prompt", "hi!"]) == 0
    assert capsys.readouterr().out.startswith("@vector.npy: ")
    assert main(["train", "run/config.json", "--workdir", "run"]) == 1
    assert "data.path: records.jsonl does not exist" in capsys.readouterr().err
    for name in ("records.jsonl", "table"):  # as the export names them
        Path(name).symlink_to(run.directory.parent / name)
    assert main(["import", "exported", "--out", "again"]) == 0
    assert np.array_equal(scores(open_run(Path("again"))), scores(run))


def test_directory_that_transformers_saved(make_run: Callable, tmp_path: Path):
    run = make_run()
    export_transformers(run, tmp_path / "exported", include_backbone=True)
    options: dict[str, Any] = {"trust_remote_code": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32, **options)
    with torch.no_grad():
        model.projector.skip.bias += 1
    model.save_pretrained(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "exported", **options).save_pretrained(tmp_path / "saved")
    import_transformers(tmp_path / "saved", tmp_path / "run")
    again = open_run(tmp_path / "run")
    before, after = (np.asarray(each.model.params["projector"]["bias"]) for each in (run, again))
    assert np.array_equal(after, before + 1)


def test_what_cannot_be_imported_is_refused(make_run: Callable, lively_backbone: Path, tmp_path: Path):
    run = make_run()
    with pytest.raises(UserError, match="not a directory that `e2p export --format transformers` wrote"):
        import_transformers(lively_backbone, tmp_path / "run")
    exported = tmp_path / "exported"
    export_transformers(run, exported, include_backbone=True)
    settings = json.loads((exported / "config.json").read_text())

    def refused(words: str, **changes: Any) -> None:
        (exported / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(UserError, match=words):
            import_transformers(exported, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused("restore that backbone", run=settings["run"] | {"fingerprint": "f" * 64})
    wrong = settings["run"]["config"] | {"projector": settings["run"]["config"]["projector"] | {"hidden_size": 8}}
    refused(r"no tensor projector.down.weight of shape \(32, 8\)", run=settings["run"] | {"config": wrong})
    refused("unknown config fields", run=settings["run"] | {"config": {"trian": {}}})
    whole = settings["run"]
    for name in ("embedding_size", "backbone", "backbone_config"):
        for value in ([], "x", -1, {"path": 5}):
            if (name, value) != ("backbone_config", {"path": 5}):
                refused(f"config.json: {name} is missing or of the wrong kind", **{name: value})
    for name in ("config", "fingerprint", "backbone_prefix"):
        refused(f"config.json: run.{name} is missing or of the wrong kind", run=whole | {name: 7})
    for text in ('{"a":' * 100_000, "[]", "\\xff", '{"model_type": "e2p", "run": NaN}'):
        (exported / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json: .*; export the run again"):  # noqa: RUF043
            import_transformers(exported, tmp_path / "run")
    refused("no tensor projector.input_mean of shape", embedding_size=10**12)
    (exported / "config.json").write_text(json.dumps(settings))
    tensors = safetensors.numpy.load_file(exported / "model.safetensors")
    tensors["projector.skip.bias"][0] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "nan.safetensors")
    shutil.copytree(exported, tmp_path / "nan")
    shutil.move(tmp_path / "nan.safetensors", tmp_path / "nan" / "model.safetensors")
    with pytest.raises(UserError, match=r"projector\.skip\.bias holds NaN or infinity"):
        import_transformers(tmp_path / "nan", tmp_path / "run")
    (exported / "config.json").write_text(json.dumps(settings))
    shutil.move(exported / "chat_template.jinja", tmp_path / "elsewhere.jinja")
    with pytest.raises(UserError, match=r"chat_template.jinja: does not exist"):
        import_transformers(exported, tmp_path / "run")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="choose a new directory"):
        import_transformers(exported, tmp_path / "run")


def in_front_of_gguf(run: Run, backbone: Path, kind: GGMLQuantizationType, folder: Path) -> Run:
    """Trains as that run was, in front of its backbone written as `folder/m.gguf`."""
    held = json.loads((backbone / "tokenizer.json").read_text())["model"]
    vocabulary = {"model": "gpt2", "pre": "smollm", "tokens": sorted(held["vocab"], key=held["vocab"].get)}
    vocabulary |= {"token_type": [3] * 6 + [1] * (len(held["vocab"]) - 6), "eos_token_id": 5, "padding_token_id": 0}
    vocabulary |= {"merges": [" ".join(merge) for merge in held["merges"]], "bos_token_id": 1, "add_bos_token": False}
    vocabulary["chat_template"] = (backbone / "chat_template.jinja").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(backbone, dtype="float32")
    path = write_model(folder / "m.gguf", model, kind, tokenizer=vocabulary)
    config = run.inputs.config
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, path=str(path)))
    return open_run(train(config, folder / "trained"), "last")


def test_a_run_in_front_of_a_gguf_file(make_run: Callable, lively_backbone: Path, tmp_path: Path):
    """Trained, opened again, exported with what the file holds, which it cannot be named by, and brought back."""
    run = in_front_of_gguf(make_run(), lively_backbone, GGMLQuantizationType.Q8_0, tmp_path)
    assert run.inputs.encoder.tokenizer.tokenize("it's 12") == ["it", "'s", "Ġ", "1", "2"]
    export_transformers(run, tmp_path / "exported", include_backbone=False)
    import_transformers(tmp_path / "exported", tmp_path / "run", **places(run))
    again = open_run(tmp_path / "run")
    assert same_projector(run, again)
    assert np.array_equal(scores(again), scores(run))
