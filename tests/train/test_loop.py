"""The training loop on the generated personas: frozen bytes, one compilation, exact resume."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from e2p_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    TrainConfig,
    from_json,
)
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.errors import UserError
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.prefix import mlp
from e2p_jax.train import loop
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.loop import read_data, train, train_model
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.run import open_run
from e2p_jax.train.setup import build_model, read_inputs
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import save_table

USERS = range(24)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A JSON Lines file of 24 users, 6 of them held out, and their table."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for user in USERS:
        write_jsonl([synthetic.record(user)], folder / "one.jsonl")
        values = json.loads((folder / "one.jsonl").read_text())
        lines.append(json.dumps({**values, "split": "validation" if user < 6 else "train"}))
        if user == 5:
            lines.append(json.dumps({**values, "split": "other"}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="synthetic", version="1")
    return folder / "records.jsonl", folder / "table"


def small_config(backbone: Path, corpus: tuple[Path, Path]) -> Config:
    path, table = corpus
    return Config(
        backbone=BackboneConfig(path=str(backbone)),
        data=DataConfig(path=str(path), embeddings=str(table), seq_len=128),
        projector=mlp.Settings(hidden_size=16),
        train=TrainConfig(steps=6, rows=4, warmup_steps=2, eval_every=3, checkpoint_every=2, log_every=1),
    )


@pytest.fixture
def config(tiny_backbone: Path, corpus: tuple[Path, Path]) -> Config:
    return small_config(tiny_backbone, corpus)


@pytest.fixture(scope="module")
def before(tiny_backbone: Path) -> dict[str, str]:
    """The backbone's files before anything was trained in front of it."""
    return file_hashes(tiny_backbone)


@pytest.fixture(scope="module")
def trained(
    tiny_backbone: Path, corpus: tuple[Path, Path], before: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of the small config as it is; to be read, or copied."""
    return train(small_config(tiny_backbone, corpus), tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def reference(trained: Path) -> list:
    """Its metrics."""
    return numbers(trained)


def numbers(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in read_metrics(run / "metrics.jsonl")]


def file_hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def test_backbone_is_untouched_and_absent_from_checkpoints(before: dict[str, str], trained: Path, tiny_backbone: Path):
    assert file_hashes(tiny_backbone) == before
    opened = open_run(trained, "last")
    stored = safetensors.numpy.load_file(tiny_backbone / "model.safetensors")
    np.testing.assert_array_equal(
        np.asarray(opened.model.params["backbone"]["embedding"]), stored["model.embed_tokens.weight"]
    )
    names = [p.name for p in Path(trained / "checkpoints").rglob("*")]
    metadata = (trained / "checkpoints" / "6" / "state" / "_METADATA").read_text()
    assert "projector/skip" in metadata
    assert "backbone" not in metadata and not any("backbone" in name for name in names)


def test_training_lowers_the_loss(config: Config, tmp_path: Path):
    everything = ("projector/**", "backbone/**")  # in front of a random backbone there is little to learn
    settings = dataclasses.replace(
        config.train, trainable=everything, steps=30, eval_every=30, checkpoint_every=30, learning_rate=1e-2
    )
    lines = numbers(train(dataclasses.replace(config, train=settings), tmp_path / "run"))
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1.0


def test_resumed_run_equals_unbroken_one(config: Config, trained: Path, tmp_path: Path):
    """From what a run leaves that dies before its last checkpoint: the same metrics, bit for bit.

    Runs that are killed are in tests/launch.
    """
    run = tmp_path / "killed"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "checkpoints" / "6")
    train(config, run)
    assert numbers(run) == numbers(trained)
    a, b = open_run(run, "last"), open_run(trained, "last")
    np.testing.assert_array_equal(
        np.asarray(a.model.params["projector"]["skip"]), np.asarray(b.model.params["projector"]["skip"])
    )


def test_a_start_from_words_is_worked_out_once(config: Config, tmp_path: Path, reference: list):
    """What resumes reads no words: here they are gone by then."""
    config = config.change(projector={"start": "words"})
    run = train(config, tmp_path / "run")
    lines = numbers(run)
    assert lines != reference
    shutil.rmtree(run / "checkpoints" / "6")
    records = [json.loads(line) | {"context": []} for line in Path(config.data.path).read_text().splitlines()]
    (tmp_path / "silent.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    silent = config.change(data={"path": str(tmp_path / "silent.jsonl")})
    assert numbers(train(silent, run)) == lines
    with pytest.raises(UserError, match=r"silent\.jsonl: no record .* has a context"):
        train(silent, tmp_path / "other")
    assert not (tmp_path / "other" / "config.json").exists()


def test_rerun_with_other_settings_is_refused(config: Config, trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=5e-4))
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.001 there, 0\.0005 here"):
        train(other, tmp_path / "run")
    lines = numbers(tmp_path / "run")
    train(dataclasses.replace(config, evaluate=EvaluateConfig(prompts=("hello?",))), tmp_path / "run")
    assert open_run(tmp_path / "run").inputs.config.evaluate.prompts == ("hello?",)
    assert numbers(tmp_path / "run") == lines  # how a run is looked at may change, and nothing is trained anew


def test_best_checkpoint_is_picked_by_users_who_are_not_reported(config: Config, reference: list):
    """One in twenty of the training users, two at least, leave the training data and pick the best checkpoint."""
    inputs = read_inputs(config)
    data = read_data(inputs)
    dev, reported = ({r.user_id for r in data.held_out[name][1]} for name in ("dev", "validation"))
    trained = {example.user_id for example in data.train.examples}
    assert (len(dev), len(reported), len(trained)) == (2, 6, 16)
    assert not dev & reported and not dev & trained and not reported & trained
    seen_again = dataclasses.replace(config.data, eval_splits=("validation", "train"))
    inputs = dataclasses.replace(inputs, config=dataclasses.replace(config, data=seen_again))
    assert "dev" not in read_data(inputs).held_out  # nobody is left whom no reported split has
    assert all("eval/dev/nll" in line for line in reference if "eval/validation/nll" in line)


def test_what_trains_of_a_bfloat16_backbone_is_kept_in_float32(config: Config, tmp_path: Path):
    """Steps far below bfloat16's resolution add up; activations stay in bfloat16."""
    changes = {"backbone": {"dtype": "bfloat16"}, "adapter": {"kind": "lora"}, "data": {"condition": "none"}}
    settings = {"trainable": ("backbone/**", "lora/**"), "learning_rate": 1e-5}
    opened = open_run(train(config.change(**changes, train=settings), tmp_path / "run"), "last")
    start = build_model(opened.inputs, Population.standard(64))
    for part in ("backbone", "lora"):
        for now, before in zip(
            jax.tree.leaves(opened.model.params[part]), jax.tree.leaves(start.params[part]), strict=True
        ):
            assert now.dtype == np.float32
            moved = np.abs(np.asarray(now) - np.asarray(before))
            assert 0 < moved.max() < 1e-4
    assert nnx.merge(opened.model.graph, opened.model.params).backbone.embed(np.zeros((1, 4), int)).dtype == "bfloat16"


def test_best_checkpoint_is_kept(config: Config, tmp_path: Path):
    """A learning rate that ruins the model: the best checkpoint is an early one, and is still there at the end."""
    ruinous = {"trainable": ("projector/**", "backbone/**"), "learning_rate": 1.0, "warmup_steps": 6}
    settings = dataclasses.replace(config.train, steps=7, eval_every=1, **ruinous)
    trained = train_model(dataclasses.replace(config, train=settings), tmp_path / "run")
    run = trained.directory
    nll = {line["step"]: line["eval/dev/nll"] for line in numbers(run) if "eval/dev/nll" in line}
    checkpoints = Checkpoints(run)
    best = checkpoints.step_of("best")
    assert best == min(nll, key=nll.get) < 5
    assert checkpoints.step_of("last") == 7
    checkpoints.close()
    assert trained.step == best  # what training hands on is what opening the run gives
    chex.assert_trees_all_equal(trained.model.params, open_run(run).model.params)


def test_bad_records_are_refused_or_skipped_and_reported(config: Config, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text(Path(config.data.path).read_text() + "{\n")

    def read(**changes: object):
        data = dataclasses.replace(config.data, path=str(path), **changes)
        return read_data(read_inputs(dataclasses.replace(config, data=data)))

    with pytest.raises(UserError, match=r"records.jsonl:26: malformed JSON"):
        read()
    with pytest.raises(UserError, match=r"1 of 26 records are bad, more than max_bad_share=0.01"):
        read(on_bad_record="skip")
    data = read(on_bad_record="skip", max_bad_share=0.05)
    assert data.skipped.startswith(f"skipped 1 of 26 records as bad; the first: {path}:26: malformed JSON")
    assert len(data.train.examples) == len(read_data(read_inputs(config)).train.examples)


def test_a_mesh_and_remat_are_invisible(config: Config, tmp_path: Path, reference: list):
    """Both at once; another mesh is in tests/launch/test_resume.py."""
    sharded = numbers(train(config.change(mesh={"fsdp": 4}, backbone={"remat": True}), tmp_path / "sharded"))
    for a, b in zip(reference, sharded, strict=True):
        assert a.keys() == b.keys()  # some are small differences of NLLs
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-4, atol=1e-5)


# Raised where jax 0.11 makes its type on Python 3.12, in C++, which ends the process.
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__ attribute:DeprecationWarning")
def test_one_compiled_program_is_called_and_traced_where_asked(
    config: Config, tmp_path: Path, reference: list, monkeypatch: pytest.MonkeyPatch
):
    """What is called cannot compile: of a jitted step the loop takes nothing but its lowering."""
    make = loop.jit_train_step
    monkeypatch.setattr(loop, "jit_train_step", lambda *settings: SimpleNamespace(lower=make(*settings).lower))
    run = train_model(config, tmp_path / "run", profile=2).directory
    assert numbers(run) == reference
    (path,) = (path for path in Path(run / "profile").rglob("*") if path.is_file())
    assert path.parent.relative_to(run / "profile") == Path("plugins/profile/steps-3-4")
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
    assert [dict(event.stats)["step_num"] for event in events] == [3, 4]


def test_every_split_is_evaluated_with_one_trace_each_and_when_it_is_asked_for(config: Config, tmp_path: Path):
    """The splits differ in how many segments a row holds, and so in the shapes of their batches."""
    short = [{"user_id": f"user-{user}", "prompt": "hi", "response": "yes.", "split": "short"} for user in range(6)]
    lines = Path(config.data.path).read_text() + "".join(json.dumps(record) + "\n" for record in short)
    (tmp_path / "records.jsonl").write_text(lines)
    splits = ("validation", "short")
    data = dataclasses.replace(config.data, path=str(tmp_path / "records.jsonl"), eval_splits=splits)
    held_out = read_data(read_inputs(dataclasses.replace(config, data=data))).held_out
    assert len({dataset.budget for dataset, _ in held_out.values()}) == 2
    config = dataclasses.replace(config, data=data).change(train={"log_every": 2, "eval_every": 2})
    lines = numbers(train(config, tmp_path / "run"))
    evaluated = [line for line in lines if "eval/validation/nll" in line]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 4, 6]
    assert [line["step"] for line in evaluated] == [2, 4, 6] and all(
        line["eval/short/nll"] != line["eval/validation/nll"] for line in evaluated
    )


def test_evaluation_equals_what_training_reported(config: Config, trained: Path):
    opened = open_run(trained, "last")
    from e2p_jax.datasets.prepared import load_records

    records = load_records(config.data.path, "validation")
    result = evaluate(opened, records, "validation", ["e2p", "none"])
    last = numbers(trained)[-1]
    assert result.scores["e2p"].per_target == pytest.approx(last["eval/validation/nll"], rel=1e-5)
    assert result.scores["none"].per_target != result.scores["e2p"].per_target


def batches(config: Config) -> dict[str, np.ndarray]:
    """Everything that a run trains and is evaluated on, by split and field."""
    data = read_data(read_inputs(config))
    datasets = {"train": data.train} | {name: dataset for name, (dataset, _) in data.held_out.items()}
    return {
        f"{name}/{field}": array
        for name, dataset in datasets.items()
        for field, array in dataset.batch(range(len(dataset.rows))).items()
    }


def parameters(config: Config) -> dict[str, np.ndarray]:
    """The model's before the first step, by path."""
    model = build_model(read_inputs(config), Population.standard(64))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}


@pytest.fixture(scope="module")
def start(tiny_backbone: Path, corpus: tuple[Path, Path]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Batches and parameters of the small config as it is."""
    config = small_config(tiny_backbone, corpus)
    return batches(config), parameters(config)


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture(scope="module")
def others(corpus: tuple[Path, Path], tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other records, vectors, a template and weights."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "fewer.jsonl").write_text("".join(corpus[0].read_text().splitlines(keepends=True)[:-6]))
    vectors = np.stack([synthetic.vector(user + 1) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="shifted", version="1")
    (folder / "short.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    shutil.copytree(tiny_backbone, folder / "backbone")
    tensors = safetensors.numpy.load_file(folder / "backbone" / "model.safetensors")
    tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, folder / "backbone" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"prefix": {"placement": "before_bos"}},
        {"prefix": {"placement": "in_chat"}},
        {"prefix": {"placement": "before_reply"}},
        {"data": {"path": "fewer.jsonl"}},
        {"data": {"embeddings": "table"}},
        {"data": {"chat_template": "short.jinja"}},
        {"data": {"seq_len": 256}},
        {"data": {"condition": "none"}},
        {"data": {"targets": "all"}},
        {"data": {"train_split": "validation"}},
        {"data": {"dev_split": "other"}},
        {"data": {"eval_splits": ("train",)}},
    ],
    ids=str,
)
def test_every_field_of_the_data_changes_the_batches(
    config: Config, others: Path, monkeypatch: pytest.MonkeyPatch, change: dict, start: tuple
):
    monkeypatch.chdir(others)
    assert same(batches(config), start[0]) and not same(batches(config.change(**change)), start[0])


@pytest.mark.parametrize(
    "change",
    [
        {"projector": {"kind": "linear"}},
        {"projector": {"hidden_size": 8}},
        {"projector": {"init_scale": 3.0}},
        {"adapter": {"kind": "lora"}, "train": {"trainable": ("projector/**", "lora/**")}},
        {"backbone": {"path": "backbone"}},
        {"backbone": {"dtype": "bfloat16"}},
        {"backbone": {"weights": "random"}},
        {"backbone": {"quantization": "nf4"}},
        {"train": {"seed": 1}},
    ],
    ids=str,
)
def test_every_field_of_the_model_changes_its_parameters(
    config: Config, others: Path, monkeypatch: pytest.MonkeyPatch, change: dict, start: tuple
):
    monkeypatch.chdir(others)
    assert not same(parameters(config.change(**change)), start[1])


SHORT = {"steps": 2, "warmup_steps": 1, "eval_every": 2}


@pytest.fixture(scope="module")
def two_steps(
    tiny_backbone: Path, corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    config = small_config(tiny_backbone, corpus).change(train=SHORT)
    return numbers(train(config, tmp_path_factory.mktemp("short") / "run"))


@pytest.mark.parametrize(
    "change",
    [
        {"projector": {"dropout": 0.5}},
        {"projector": {"max_scale": 1.0}},
        {"projector": {"noise": 0.5}},
        {"projector": {"num_tokens": 2, "shared_tokens": 1}},
        {"train": {"learning_rate": 1e-4}},
        {"train": {"bias_learning_rate": 0.5}},
        {"train": {"beta2": 0.5}},
        {"train": {"clip_norm": 1e-3}},
        {"train": {"null_user_rate": 0.5}},
        {"train": {"rows": 8}},
        {"train": {"accumulation": 2}},  # each micro-batch draws its own dropout
        {"train": {"trainable": ("projector/**", "backbone/final_norm")}},
    ],
    ids=str,
)
def test_every_field_of_the_steps_changes_the_result(config: Config, tmp_path: Path, change: dict, two_steps: list):
    """What a learning rate and weight decay are made of is in tests/train/test_optimizer.py."""
    assert numbers(train(config.change(train=SHORT).change(**change), tmp_path / "run")) != two_steps


def test_a_quantised_backbone_stays_frozen(config: Config, tmp_path: Path):
    settings = dataclasses.replace(config.train, trainable=("backbone/layers/q*",))
    backbone = dataclasses.replace(config.backbone, quantization="int8")
    with pytest.raises(UserError, match=r"train\.trainable names weights of the backbone, and backbone\.quantization"):
        train(dataclasses.replace(config, train=settings, backbone=backbone), tmp_path / "run")


@pytest.mark.parametrize("condition", ["none", "text"])
def test_a_projector_that_stands_nowhere_is_not_trained(config: Config, tmp_path: Path, condition: str):
    """Its gradient would be zero in every step, and the run end as if it had learned."""
    with pytest.raises(UserError, match=rf"data\.condition={condition} puts no soft tokens in front"):
        train(config.change(data={"condition": condition}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_users_without_a_vector_are_refused_or_the_null_user(config: Config, tmp_path: Path, reference: list):
    """Four training and two held-out users have no vector: they stay in, and in nobody's statistics."""
    known = [user for user in USERS if user % 4]
    vectors = np.stack([synthetic.vector(user) for user in known])
    save_table(tmp_path / "table", [f"user-{user}" for user in known], vectors, name="some", version="1")
    data = dataclasses.replace(config.data, embeddings=str(tmp_path / "table"))
    with pytest.raises(UserError, match=r"user 'user-8' has no vector in .*table; add it or drop the record"):
        train(dataclasses.replace(config, data=data), tmp_path / "refused")
    data = dataclasses.replace(data, missing_user="null")
    settings = dataclasses.replace(config.train, null_user_rate=0.2)
    run = train(dataclasses.replace(config, data=data, train=settings), tmp_path / "run")
    assert [len(line) for line in numbers(run)] == [len(line) for line in reference]
    projector = open_run(run, "last").model.params["projector"]
    assert np.abs(projector["null_user"]).max() > 0  # it learned
    _, dev = read_data(read_inputs(dataclasses.replace(config, data=data, train=settings))).held_out["dev"]
    others = {record.user_id for record in dev}
    trained = np.stack([synthetic.vector(user) for user in known if user >= 6 and f"user-{user}" not in others])
    np.testing.assert_allclose(projector["input_mean"], trained.mean(0), atol=1e-5)

    nobody = dataclasses.replace(data, path=str(tmp_path / "others.jsonl"))
    write_jsonl([synthetic.record(user) for user in range(100, 110)], tmp_path / "others.jsonl")
    with pytest.raises(UserError, match=r"table: holds none of the \d+ training users"):
        train(dataclasses.replace(config, data=nobody, train=settings), tmp_path / "nobody")


def test_attention_of_another_device_is_refused(config: Config, tmp_path: Path):
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, attention="splash"))
    with pytest.raises(UserError, match=r"backbone\.attention=splash needs a TPU"):
        train(config, tmp_path / "run")


def test_resuming_knows_the_data_by_what_it_holds(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever it lies, and by whatever path; a position means nothing in other records or another order of rows."""
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    names = [f"user-{user}" for user in USERS]
    text = Path(config.data.path).read_text()

    def lie(folder: Path, text: str, vectors: np.ndarray, path: str) -> Config:
        folder.mkdir()
        (folder / "records.jsonl").write_text(text)
        save_table(folder / "table", names, vectors, name="synthetic", version="1")
        data = dataclasses.replace(config.data, path=f"{path}/records.jsonl", embeddings=f"{path}/table")
        return dataclasses.replace(config, data=data)

    begun = lie(tmp_path / "begun", text, vectors, str(tmp_path / "begun"))
    run = train(begun, tmp_path / "run")
    shutil.rmtree(tmp_path / "begun")
    monkeypatch.chdir(tmp_path)
    moved = lie(tmp_path / "moved", text, vectors, "moved")
    train(moved, run)
    assert from_json((run / "config.json").read_bytes(), run / "config.json") == moved
    dev = {record.user_id for record in read_data(read_inputs(moved)).held_out["dev"][1]}
    assert 0 < len(dev) < 4
    edits = {"records": lambda user: user not in dev, "dev": lambda user: user in dev, "vectors": lambda user: False}
    for what, edit in edits.items():
        edited = "".join(
            line.replace("good", "bad") if edit(json.loads(line)["user_id"]) else line
            for line in text.splitlines(keepends=True)
        )
        assert (edited == text) == (what == "vectors")
        other = lie(tmp_path / what, edited, vectors[::-1] if what == "vectors" else vectors, str(tmp_path / what))
        said = "dev" if what == "dev" else "training"
        with pytest.raises(
            UserError, match=rf"run: its position is one in other {said} data: .* since step 6; restore"
        ):
            train(other, run)
        assert from_json((run / "config.json").read_bytes(), run / "config.json") == moved
