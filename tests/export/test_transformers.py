"""The exported directory in transformers and torch, against e2p_jax itself."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from e2p_jax.cli import main
from e2p_jax.config import Config
from e2p_jax.datasets.prepared import load_records
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate.evaluation import evaluate, save
from e2p_jax.evaluate.generate import Sampling, generate, vectors_for
from e2p_jax.export.import_back import import_transformers
from e2p_jax.export.transformers import export_transformers
from e2p_jax.train.run import Run, open_run

WAYS = [
    ("before_bos", 1, "mlp"),
    ("after_bos", 3, "linear"),
    ("before_reply", 3, "blocks", "auto", 0.0, 1),
    ("in_chat", 1, "mlp"),
]
PROMPTS = ["hi!", "what do you like to eat?", "where do you live, and do you have any pets?"]


def load(directory: Path, **options: Any) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, **options
    )
    return model, transformers.AutoTokenizer.from_pretrained(directory, padding_side="left", trust_remote_code=False)


def records_of(run: Run, count: int = 8) -> list[Record]:
    return load_records(run.inputs.config.data.path, "all")[:count]


def vectors_of(run: Run, users: list[str]) -> torch.Tensor:
    return torch.tensor(vectors_for(run, users, users, "e2p"))


def questions(run: Run, users: list[str]) -> list[Record]:
    return [
        Record(user, (), ({"role": "user", "content": prompt},), source=user)
        for user, prompt in zip(users, PROMPTS, strict=True)
    ]


def chat(tokenizer: Any, records: list[Record]) -> Any:
    return tokenizer.apply_chat_template(
        [list(record.messages) for record in records],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )


def summed_nll(run: Run, model: Any, tokenizer: Any, record: Record) -> tuple[float, int]:
    """In nats over the targets, and how many these are."""
    encoded = tokenizer.apply_chat_template(list(record.messages), return_dict=True, return_assistant_tokens_mask=True)
    ids = torch.tensor([encoded["input_ids"]])
    wanted = torch.tensor([encoded["assistant_masks"]], dtype=torch.bool)
    with torch.no_grad():
        loss = model(ids, user_embedding=vectors_of(run, [record.user_id]), labels=ids.masked_fill(~wanted, -100)).loss
    return float(loss) * int(wanted.sum()), int(wanted.sum())


@pytest.mark.parametrize("include_backbone", [True, False])
def test_nll_of_every_example_is_the_same(make_run: Callable, tmp_path: Path, include_backbone: bool):
    """Whole conversations of a run that was trained; test_export_families.py has all families and all ways."""
    run = make_run("before_reply", 3, "blocks", shared=1) if include_backbone else make_run("after_bos", 3, "linear")
    records = records_of(run)
    ours = evaluate(run, records, "all", ["e2p"]).scores["e2p"]
    export_transformers(run, tmp_path / "out", include_backbone)
    model, tokenizer = load(tmp_path / "out")
    for record, nll, targets in zip(records, ours.nll, ours.targets, strict=True):
        theirs, count = summed_nll(run, model, tokenizer, record)
        assert count == targets and theirs == pytest.approx(nll, rel=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_greedy_answers_are_the_same(make_run: Callable, tmp_path: Path, way: tuple):
    """Three users and prompts of three lengths in one left-padded batch."""
    run, users = make_run(*way), ["user-1", "user-2", "user-3"]
    asked = questions(run, users)
    vectors = vectors_of(run, users)
    ours = generate(run, asked, vectors.numpy(), "e2p", Sampling(max_new_tokens=12))
    swapped = generate(run, asked, vectors.flip(0).numpy(), "e2p", Sampling(max_new_tokens=12))
    assert ours != swapped, "the prefix makes no difference here, so nothing is tested"
    export_transformers(run, tmp_path / "out", include_backbone=True)
    model, tokenizer = load(tmp_path / "out")
    inputs = chat(tokenizer, asked)
    out = model.generate(**inputs, user_embedding=vectors, max_new_tokens=12, do_sample=False)
    start = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :start], inputs["input_ids"])
    theirs = [text.strip() for text in tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)]
    assert theirs == ours


@pytest.fixture
def exported(make_run: Callable, tmp_path: Path) -> tuple[Run, Path]:
    run = make_run()
    export_transformers(run, tmp_path / "out", include_backbone=True)
    return run, tmp_path / "out"


def test_beams_samples_cache_and_dictionaries(exported: tuple[Run, Path]):
    run, out = exported
    model, tokenizer = load(out)
    users = ["user-1", "user-2", "user-3"]
    inputs = {**chat(tokenizer, questions(run, users)), "user_embedding": vectors_of(run, users)}
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    uncached = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(greedy, uncached)
    result = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(result.sequences, greedy)
    alone = [
        model.generate(
            inputs["input_ids"][i : i + 1],
            inputs["attention_mask"][i : i + 1],
            inputs["user_embedding"][i],
            max_new_tokens=8,
            do_sample=False,
            num_beams=3,
        )
        for i in range(3)
    ]
    beams = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=3)
    for row, one in zip(beams, alone, strict=True):
        assert torch.equal(row[: one.shape[1]], one[0])
    torch.manual_seed(0)
    sampled = model.generate(**inputs, max_new_tokens=8, do_sample=True, num_return_sequences=2)
    assert len(sampled) == 6 and torch.equal(sampled[0, : inputs["input_ids"].shape[1]], inputs["input_ids"][0])
    assert len({tuple(row) for row in sampled.tolist()}) > 3


def test_pipeline(exported: tuple[Run, Path]):
    run, out = exported
    model, tokenizer = load(out)
    asked = questions(run, ["user-1", "user-2", "user-3"])[:1]
    vectors = vectors_of(run, ["user-1"])
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = pipe(list(asked[0].messages), user_embedding=vectors, max_new_tokens=12, do_sample=False)
    said = answer[0]["generated_text"][-1]["content"].strip()
    assert said == generate(run, asked, vectors.numpy(), "e2p", Sampling(max_new_tokens=12))[0]


def test_activation_checkpointing_changes_nothing(exported: tuple[Run, Path]):
    run, out = exported
    model, tokenizer = load(out)
    inputs = chat(tokenizer, questions(run, ["user-1", "user-2", "user-3"]))
    vectors = vectors_of(run, ["user-1", "user-2", "user-3"])

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs, user_embedding=vectors, labels=inputs["input_ids"]).loss.backward()
        return model.projector.skip.weight.grad.clone()

    plain = gradient()
    model.train()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain)
    assert plain.abs().max() > 0


def test_saved_again_it_is_the_same(exported: tuple[Run, Path], tmp_path: Path):
    run, out = exported
    model, tokenizer = load(out)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    inputs = chat(tokenizer, questions(run, ["user-1", "user-2", "user-3"]))
    vectors = vectors_of(run, ["user-1", "user-2", "user-3"])
    with torch.no_grad():
        assert torch.equal(
            model(**inputs, user_embedding=vectors).logits, again(**inputs, user_embedding=vectors).logits
        )


def test_backbone_bytes_are_the_source_s(exported: tuple[Run, Path], lively_backbone: Path):
    _, out = exported
    source = safetensors.numpy.load_file(lively_backbone / "model.safetensors")
    copied = safetensors.numpy.load_file(out / "model.safetensors")
    assert {name for name in copied if name.startswith("backbone.")} == {f"backbone.{name}" for name in source}
    for name, tensor in source.items():
        assert copied[f"backbone.{name}"].dtype == tensor.dtype
        assert copied[f"backbone.{name}"].tobytes() == tensor.tobytes()


def synthetic_width(run: Run) -> int:
    return run.inputs.table.width


def test_another_backbone_is_refused(make_run: Callable, lively_backbone: Path, tmp_path: Path):
    run = make_run()
    export_transformers(run, tmp_path / "out", include_backbone=False)
    shutil.copytree(lively_backbone, tmp_path / "other")
    tensors = safetensors.numpy.load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1e-3)
    safetensors.numpy.save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    settings["backbone"]["path"] = str(tmp_path / "other")
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="not the weights this projector was trained in front of"):
        load(tmp_path / "out")


def test_a_config_that_changed_beside_the_named_weights_has_no_say(
    make_run: Callable, lively_backbone: Path, tmp_path: Path
):
    """The export has the backbone's config.json as it was in training, and goes by that."""
    run = make_run()
    export_transformers(run, tmp_path / "out", include_backbone=False)
    shutil.copytree(lively_backbone, tmp_path / "other")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    settings["backbone"]["path"] = str(tmp_path / "other")
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    ids, vector = torch.tensor([[1, 40, 50, 60]]), torch.ones(1, synthetic_width(run))
    before = load(tmp_path / "out")[0](ids, user_embedding=vector).logits
    changed = json.loads((tmp_path / "other" / "config.json").read_text()) | {"rope_theta": 100.0, "rms_norm_eps": 0.1}
    changed.pop("rope_parameters", None)
    (tmp_path / "other" / "config.json").write_text(json.dumps(changed))
    torch.testing.assert_close(load(tmp_path / "out")[0](ids, user_embedding=vector).logits, before, rtol=0, atol=0)


def test_mistakes_are_named(exported: tuple[Run, Path]):
    run, out = exported
    model, _ = load(out)
    ids = torch.tensor([[1, 40, 50], [1, 41, 51]])
    width = synthetic_width(run)
    with pytest.raises(ValueError, match="user_embedding is missing"):
        model.generate(ids)
    with pytest.raises(ValueError, match=rf"shape \(2, 3\); needs \[2, {width}\]"):
        model(ids, user_embedding=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=rf"shape \(3, {width}\); needs \[2, {width}\]"):
        model.generate(ids, user_embedding=torch.zeros(3, width))
    with pytest.raises(ValueError, match="NaN or infinity"):
        model(ids, user_embedding=torch.full((2, width), float("nan")))
    with pytest.raises(ValueError, match="user_embeddings"):
        model.generate(ids, user_embedding=torch.zeros(2, width), user_embeddings=torch.zeros(2, width))


def test_null_user_goes_along(make_run: Callable, tmp_path: Path):
    run = make_run(null=0.3)
    export_transformers(run, tmp_path / "out", include_backbone=True)
    model, _ = load(tmp_path / "out")
    vectors = vectors_of(run, ["user-1", "user-2"])
    vectors[1] = torch.nan
    ours = nnx.merge(run.model.graph, run.model.params).projector(np.asarray(vectors))
    assert np.isfinite(ours).all()
    with torch.no_grad():
        theirs = model.soft_tokens(vectors, torch.zeros(2, 3, dtype=torch.long)).numpy()
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    vectors[1, 0] = 0.0
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        model.soft_tokens(vectors, torch.zeros(2, 3, dtype=torch.long))


def test_what_the_command_writes_an_example_is_the_same(make_run: Callable, tmp_path: Path):
    """Line by line of what `--per-example` writes."""
    run = make_run()
    arguments = ["evaluate", str(run.directory), "--checkpoint", "last", "--conditions", "e2p"]
    arguments += ["--data", run.inputs.config.data.path, "--per-example", str(tmp_path / "scores.jsonl")]
    assert main(arguments) == 0
    assert main(["export", str(run.directory), "--checkpoint", "last", "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    model, tokenizer = load(tmp_path / "out")
    for record, line in zip(records_of(run), lines, strict=False):
        loss, targets = summed_nll(run, model, tokenizer, record)
        assert line["user_id"] == record.user_id and line["target_tokens"] == targets
        assert loss == pytest.approx(line["nll"], rel=1e-4)


def test_nothing_of_this_machine_is_in_an_export(exported: tuple[Run, Path]):
    run, out = exported
    for path in out.iterdir():
        if path.suffix != ".safetensors":
            assert str(run.directory.parent.parent) not in path.read_text(encoding="utf-8"), path.name
    config = json.loads((out / "config.json").read_text())["run"]["config"]
    assert config["data"]["path"] == "records.jsonl" and config["data"]["embeddings"] == "table"
    assert config["backbone"]["path"] == run.inputs.directory.name


def test_tokenizer_needs_no_code_of_ours(exported: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch):
    """AutoTokenizer reads config.json first, and asks before it runs the configuration's code; no is an answer."""
    run, out = exported
    own = run.inputs.encoder.tokenizer
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    for options in ({}, {"trust_remote_code": False}):
        tokenizer = transformers.AutoTokenizer.from_pretrained(out, **options)
        assert tokenizer.get_vocab() == own.get_vocab() and type(tokenizer) is type(own)
        assert tokenizer.chat_template == run.inputs.encoder.template
    assert len(asked) == 1
    settings = json.loads((out / "tokenizer_config.json").read_text())
    source = json.loads((run.inputs.directory / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == source["tokenizer_class"]


def test_older_transformers_refuse_what_they_would_overlook(exported: tuple[Run, Path], monkeypatch: Any):
    config = load(exported[1])[0].config
    dialects: list[dict[str, Any]] = [{"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4}}]
    older, newer = ({"model_type": "llama", **each} for each in dialects)
    theirs = sys.modules[type(config).__module__].transformers  # another object once PEFT was imported
    monkeypatch.setattr(theirs, "__version__", "4.57.6")
    assert type(config)(backbone_config=older).backbone_config.model_type == "llama"
    with pytest.raises(ValueError, match="would overlook its rope_parameters"):
        type(config)(backbone_config=newer)


@pytest.mark.parametrize("include_backbone", [True, False])
def test_dtype_and_device(make_run: Callable, tmp_path: Path, include_backbone: bool):
    run = make_run()
    export_transformers(run, tmp_path / "out", include_backbone)
    for options, dtype in [({"dtype": torch.bfloat16}, torch.bfloat16), ({"dtype": "auto"}, torch.float32), ({}, None)]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True, device_map="cpu", **options
        )
        assert model.projector.skip.weight.dtype == torch.float32 and not model.training
        assert model.get_input_embeddings().weight.dtype == (dtype or torch.float32)
        out = model(torch.tensor([[1, 40, 50]]), user_embedding=torch.zeros(run.inputs.table.width))
        assert out.logits.shape[:2] == (1, 4) and out.logits.dtype == (dtype or torch.float32)


def test_runs_that_cannot_be_exported(make_run: Callable, tmp_path: Path):
    run = make_run()
    mask = {**run.model.mask, "backbone": {"final_norm": True}}
    trained = dataclasses.replace(run, model=dataclasses.replace(run.model, mask=mask))
    with pytest.raises(UserError, match="this run trained the backbone itself"):
        export_transformers(trained, tmp_path / "out", include_backbone=True)


def test_the_embedded_backbone_always_comes_along(make_run: Callable, tmp_path: Path):
    run = make_run()
    config: Config = run.inputs.config
    backbone = dataclasses.replace(config.backbone, path="embedded")
    inputs = dataclasses.replace(run.inputs, config=dataclasses.replace(config, backbone=backbone))
    export_transformers(dataclasses.replace(run, inputs=inputs), tmp_path / "out", include_backbone=False)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("backbone.") for name in written)


def test_an_extreme_user_is_held_to_the_same_bound(make_run: Callable, tmp_path: Path):
    """In torch, and in a run that was imported back, as in the run."""
    run = make_run()
    vectors = np.random.default_rng(0).normal(size=(4, synthetic_width(run))).astype(np.float32)
    vectors[1:] *= np.array([[10], [1e3], [1e6]], np.float32)
    wanted = np.asarray(run.model.merged.projector(vectors))
    rms = np.sqrt(np.mean(np.square(wanted), axis=-1))
    assert rms[2:] == pytest.approx(float(run.model.merged.projector.bound), rel=1e-5) and (rms[0] < rms[3]).all()
    export_transformers(run, tmp_path / "out", include_backbone=True)
    model, _ = load(tmp_path / "out")
    with torch.no_grad():
        np.testing.assert_allclose(model.projector(torch.tensor(vectors)), wanted, rtol=1e-4, atol=1e-5)
    import_transformers(tmp_path / "out", tmp_path / "run")
    np.testing.assert_array_equal(open_run(tmp_path / "run").model.merged.projector(vectors), wanted)


def test_model_card_names_what_was_measured(make_run: Callable, tmp_path: Path):
    run = make_run()
    evaluation = evaluate(run, records_of(run), "validation", ["none", "e2p"])
    save(run, [evaluation])
    export_transformers(run, tmp_path / "out", include_backbone=True)
    card = (tmp_path / "out" / "README.md").read_text()
    (run.directory / "report" / "evaluation.json").unlink()
    assert f"({run.inputs.table.width} numbers)" in card and "`after_bos`" in card
    scores = evaluation.scores["e2p"]
    assert f"| validation | e2p | {scores.per_target:.4f} | {scores.word_perplexity:.2f} |" in card
    code = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")
