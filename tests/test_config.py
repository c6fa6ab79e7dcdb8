"""Configs: round trip, refusals, shipped files, and no field that nobody reads."""

import ast
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from other_values import another

import e2p_jax
from e2p_jax import config as config_lib
from e2p_jax.backbone import lora
from e2p_jax.config import (
    AdapterConfig,
    BackboneConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    PrefixConfig,
    ProjectorConfig,
    TrainConfig,
)
from e2p_jax.config_fields import fields_that
from e2p_jax.errors import UsageError, UserError
from e2p_jax.parallel.mesh import AXES
from e2p_jax.prefix import mlp

SHIPPED = sorted(
    str(path.relative_to(config_lib.config_directory()).with_suffix(""))
    for path in config_lib.config_directory().rglob("*.py")
)


def _changed() -> Config:
    sections = {}
    for section in dataclasses.fields(Config):
        default = section.default
        kinds = typing.get_type_hints(type(default), include_extras=True)
        values = {name: another(getattr(default, name), kind) for name, kind in kinds.items()}
        sections[section.name] = type(default)(**values)
    return Config(**sections)


@pytest.mark.parametrize("config", [Config(), _changed()], ids=["defaults", "every field changed"])
def test_json_round_trip(config: Config) -> None:
    text = config.to_json()
    assert config_lib.from_json(text, Path("config.json")) == config
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(config)))


def test_a_run_is_read_without_what_is_gone() -> None:
    old = json.loads(Config().to_json())
    old["projector"]["shrink"] = 0.2
    old["train"] |= {"distill": 0.9, "teacher_tokens": 16, "teacher_temperature": 1.0, "borrowed": 3}
    assert config_lib.from_json(json.dumps(old), Path("config.json")) == Config()


def test_a_run_made_before_soft_tokens_had_a_bound_has_none() -> None:
    old = json.loads(Config().to_json())
    del old["projector"]["max_scale"]
    assert config_lib.from_json(json.dumps(old), Path("config.json")).projector.max_scale == 0


def test_a_catalogue_of_before_items_tokens_is_refused() -> None:
    old = json.loads(Config(data=DataConfig(items="items")).to_json())
    del old["items"]["token"]
    with pytest.raises(
        UserError, match=r"run/config\.json: items\.token is missing: an earlier version .*train it anew"
    ):
        config_lib.from_json(json.dumps(old), Path("run/config.json"))
    old["data"]["items"] = None  # no head over items, so nothing that could rank otherwise
    assert config_lib.from_json(json.dumps(old), Path("run/config.json")) == Config()


def test_changed_config_differs_in_every_field() -> None:
    for section in dataclasses.fields(Config):
        ours, default = getattr(_changed(), section.name), section.default
        assert all(getattr(ours, f.name) != getattr(default, f.name) for f in dataclasses.fields(default))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": {"step": 3}}', r"run/config\.json: unknown config fields \['train\.step'\]; .*'steps'"),
        ('{"trian": {}}', r"run/config\.json: unknown config fields \['trian'\]"),
        ('{"train": 3}', r"run/config\.json: train must be a JSON object"),
        ("[]", r"run/config\.json: the file must be a JSON object"),
        ('{"train":\n {"steps": }}', r"run/config\.json: line 2: malformed JSON"),
        ('{"train": {"steps": "3"}}', r"run/config\.json: train\.steps is '3'; it must be a whole number"),
        ('{"train": {"beta2": NaN}}', r"run/config\.json: malformed JSON \(NaN is no number"),
        ('{"data": {"eval_splits": "test"}}', r"run/config\.json: data\.eval_splits is 'test'; it must be a tuple"),
        ("[" * 100_000, r"run/config\.json: malformed JSON"),
        ('{"train": {"steps": 3}, "train": {}}', r"run/config\.json: malformed JSON \(the key 'train' stands twice"),
        ('{"train": {"beta2": 1e999}}', r"run/config\.json: train\.beta2 is inf; it must be a finite number"),
    ],
    ids=range(11),
)
def test_malformed_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_lib.from_json(text, Path("run/config.json"))


REFUSED: list[tuple[Any, str]] = [
    (DataConfig(seq_len=500), "data.seq_len must be a multiple of 128"),
    (DataConfig(seq_len=0), "data.seq_len must be a multiple of 128"),
    (DataConfig(eval_splits=()), "data.eval_splits is empty"),
    (DataConfig(template_date="26 Jul 2024"), "data.template_date must be a date like 2024-07-26"),
    (DataConfig(context_prompt="persona"), "data.context_prompt must contain {context}"),
    (DataConfig(condition="prefix"), "data.condition is 'prefix'; choose from none, e2p, text, e2p+text, static"),
    (DataConfig(too_long="cut"), "data.too_long is 'cut'; choose from drop_oldest, refuse"),
    (DataConfig(on_bad_record="drop"), "data.on_bad_record is 'drop'; choose from error, skip"),
    (DataConfig(max_bad_share=1.0), "data.max_bad_share must be in [0, 1)"),
    (
        ProjectorConfig(max_scale=0.5),
        "projector.max_scale is below projector.init_scale: the first soft tokens would be beyond the bound",
    ),
    (DataConfig(targets="user"), "data.targets is 'user'"),
    (
        PrefixConfig(placement="in_caht"),
        "prefix.placement is 'in_caht'; choose from after_bos, before_bos, in_chat, before_reply",
    ),
    (BackboneConfig(dtype="float16"), "backbone.dtype is 'float16'; choose from auto, float32, bfloat16"),
    (BackboneConfig(weights="none"), "backbone.weights is 'none'"),
    (BackboneConfig(quantization="fp4"), "backbone.quantization is 'fp4'; choose from none, int8, int4, nf4"),
    (BackboneConfig(quantization="int8", weights="random"), "backbone.quantization is of pretrained weights"),
    (ProjectorConfig(kind="resnet"), "projector.kind is 'resnet'; choose from mlp, linear"),
    (ProjectorConfig(num_tokens=0), "projector.num_tokens must be positive"),
    (mlp.Settings(hidden_size=0), "projector.hidden_size must be positive"),
    (ProjectorConfig(noise=-0.1), "projector.noise must not be negative"),
    (ProjectorConfig(shared_tokens=-1), "projector.shared_tokens must not be negative"),
    (ProjectorConfig(num_tokens=2, shared_tokens=2), "projector.shared_tokens must be below projector.num_tokens"),
    (mlp.Settings(dropout=1.0), "projector.dropout must be in [0, 1)"),
    (TrainConfig(steps=0, warmup_steps=0), "train.steps must be positive"),
    (TrainConfig(bias_learning_rate=-0.1), "train.bias_learning_rate must not be negative"),
    (TrainConfig(rows=0), "train.rows must be positive"),
    (TrainConfig(rows=8, accumulation=3), "train.accumulation must divide train.rows"),
    (TrainConfig(accumulation=0), "train.accumulation must divide train.rows"),
    (TrainConfig(steps=50, warmup_steps=50), "train.warmup_steps must be from 0 to below train.steps"),
    (TrainConfig(warmup_steps=-1), "train.warmup_steps must be from 0 to below train.steps"),
    (TrainConfig(learning_rate=0.0), "train.learning_rate must be positive"),
    (TrainConfig(steps="9"), "train.steps is '9'; it must be a whole number of 32 bits"),
    (TrainConfig(rows=True), "train.rows is True; it must be a whole number of 32 bits"),
    (TrainConfig(steps=2**40), "train.steps is 1099511627776; it must be a whole number of 32 bits"),
    (TrainConfig(trainable="projector/**"), "train.trainable is 'projector/**'; it must be a tuple"),
    (TrainConfig(trainable=(3,)), "train.trainable is (3,); it must be a str"),
    (DataConfig(embeddings=3), "data.embeddings is 3; it must be a str"),
    (TrainConfig(final_learning_rate=-0.1), "train.final_learning_rate must be in [0, 1]"),
    (TrainConfig(weight_decay=-0.1), "train.weight_decay must not be negative"),
    (TrainConfig(seed=-1), "train.seed must not be negative"),
    (ProjectorConfig(init_scale=0.0), "projector.init_scale must be positive"),
    (TrainConfig(clip_norm=0.0), "train.clip_norm must be positive"),
    (TrainConfig(null_user_rate=1.0), "train.null_user_rate must be in [0, 1)"),
    (DataConfig(missing_user="null"), "data.missing_user=null needs a null user: set train.null_user_rate"),
    (DataConfig(items="items", targets="all"), "data.items needs data.targets=assistant"),
    (DataConfig(missing_user="drop"), "data.missing_user is 'drop'; choose from error, null"),
    (TrainConfig(beta2=1.0), "train.beta2 must be in [0, 1)"),
    (TrainConfig(eval_every=0), "train.eval_every must be positive"),
    (TrainConfig(checkpoint_every=0), "train.checkpoint_every must be positive"),
    (TrainConfig(log_every=0), "train.log_every must be positive"),
    (TrainConfig(trainable=()), "train.trainable is empty"),
    (MeshConfig(fsdp=0), "mesh.fsdp must be positive, or -1"),
    (MeshConfig(tensor=-2), "mesh.tensor must be positive, or -1"),
    (DataConfig(dev_split="validation"), "data.dev_split must be auto, or a split that is neither trained on"),
    (DataConfig(dev_split="train"), "data.dev_split must be auto, or a split that is neither trained on"),
    (lora.Settings(rank=0), "adapter.rank must be positive"),
    (AdapterConfig(kind="lora"), "adapter.kind is lora, but train.trainable names no lora/**"),
    (AdapterConfig(kind="ia3"), "adapter.kind is 'ia3'; choose from none, lora"),
    (EvaluateConfig(conditions=("e2p", "own")), "evaluate.conditions is ('e2p', 'own'); choose from none, e2p"),
    (EvaluateConfig(measures=("rank",)), "evaluate.measures is ('rank',); choose from ranking, users, texts"),
    (EvaluateConfig(candidates=1), "evaluate.candidates must be 2 or more"),
    (EvaluateConfig(max_records=-1), "evaluate.max_records must not be negative"),
    (EvaluateConfig(bootstrap_samples=0), "evaluate.bootstrap_samples must be positive"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_config_that_cannot_run_is_refused(section: Any, message: str) -> None:
    name = next(f.name for f in dataclasses.fields(Config) if isinstance(section, type(f.default)))
    with pytest.raises(UserError) as caught:
        Config(**{name: section}).validate()
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_number_is_finite(value: float) -> None:
    for section in dataclasses.fields(Config):
        kinds = typing.get_type_hints(type(section.default))
        for name in (name for name, kind in kinds.items() if kind is float):
            changed = Config(**{section.name: dataclasses.replace(section.default, **{name: value})})
            with pytest.raises(UserError, match=rf"{section.name}\.{name} is {value}; it must be a finite number"):
                changed.validate()


def test_a_section_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="train is 3; it must be a TrainConfig"):
        Config(train=3).validate()  # type: ignore[arg-type]


def test_there_are_shipped_configs() -> None:
    assert {"quickstart", "backbone"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads_and_is_valid(name: str) -> None:
    short, config = config_lib.load_config(name)
    assert short == name.split("/")[-1]
    config.validate()


def test_config_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from e2p_jax.config import *\nconfig = Config(train=TrainConfig(steps=77))\n")
    assert config_lib.load_config(str(path)) == ("mine", Config(train=TrainConfig(steps=77)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = {}", r"mine\.py: must define `config`, a Config, and not dict"),
        ("", r"mine\.py: must define `config`, a Config, and not NoneType"),
        ("raise SystemExit(0)", r"mine\.py: SystemExit: 0; correct the file"),
        ("while True: pass", r"mine\.py: TimeoutError: still running after 0\.3 s"),
        ("from e2p_jax.config import *\nconfig = Config(train=TrainConfig(step=1))", r"mine\.py: TypeError: .*'step'"),
        ("config = (", r"mine\.py: SyntaxError"),
    ],
)
def test_broken_config_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str) -> None:
    monkeypatch.setattr(config_lib, "LOAD_SECONDS", 0.3)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        config_lib.load_config(str(tmp_path / "mine.py"))
    assert "\n" not in str(caught.value)


def test_unknown_config_lists_the_shipped_ones() -> None:
    with pytest.raises(UsageError, match=r"config 'quikstart': .* does not exist; shipped configs: .*quickstart"):
        config_lib.load_config("quikstart")
    with pytest.raises(UsageError, match="does not exist; shipped configs"):
        config_lib.load_config("x" * 5000)


def test_resolved_paths_are_absolute_and_reserved_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("backbone", "synthetic", "embedded"):
        (tmp_path / name).mkdir()
    (tmp_path / "t.npz").touch()
    local = Config(BackboneConfig(path="backbone"), DataConfig(path="data.jsonl", embeddings="t.npz")).resolved()
    assert local.backbone.path == str(tmp_path / "backbone")
    assert local.data.embeddings == str(tmp_path / "t.npz")
    assert local.data.path == "data.jsonl"  # not there: left for the reader's error
    assert Config().resolved() == Config()


def test_portable_paths_are_names_only() -> None:
    local = Config(BackboneConfig(path="/a/backbone"), DataConfig(path="/a/b/data.jsonl", embeddings="/a/t.npz"))
    named = local.portable()
    assert (named.backbone.path, named.data.path, named.data.embeddings) == ("backbone", "data.jsonl", "t.npz")
    hub = Config(BackboneConfig(path="org/model"))
    assert hub.portable() == hub


def _reads(section: str) -> set[str]:
    """Attributes read from `...<section>.x`, `config.x` or `settings.x` in the package but for config.py."""
    found = set()
    for path in Path(e2p_jax.__file__).parent.rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in (
                section,
                "config",
                "settings",
            ):
                found.add(node.attr)
    return found


@pytest.mark.parametrize("section", [f.name for f in dataclasses.fields(Config) if f.name != "mesh"])
def test_every_field_is_read_somewhere(section: str) -> None:
    default = getattr(Config(), section)
    unread = {f.name for f in dataclasses.fields(default)} - _reads(section)
    assert not unread, f"nothing reads {section}.{sorted(unread)}"


@pytest.mark.parametrize("section", dataclasses.fields(Config), ids=lambda section: section.name)
def test_every_field_says_what_it_does_to_the_result(section: dataclasses.Field) -> None:
    said = [set(fields_that(effect, section.default)) for effect in ("result", "rounding", "free")]
    assert set().union(*said) == {field.name for field in dataclasses.fields(section.default)}


def test_mesh_fields_are_the_axes() -> None:
    assert tuple(f.name for f in dataclasses.fields(MeshConfig)) == AXES


@pytest.mark.parametrize("name", ["persona_chat", "pens", "interactions"])
def test_dataset_configs_take_a_file_of_ones_own(tmp_path: Path, name: str) -> None:
    """With nothing but a JSON Lines file without splits, and a table."""
    import numpy as np

    from e2p_jax.datasets import synthetic
    from e2p_jax.datasets.records import write_jsonl
    from e2p_jax.train.loop import read_data
    from e2p_jax.train.setup import read_inputs
    from e2p_jax.vectors.table import save_table

    write_jsonl([synthetic.record(user) for user in range(60)], tmp_path / "own.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in range(60)])
    save_table(tmp_path / "table", [f"user-{user}" for user in range(60)], vectors, name="own", version="1")
    _, config = config_lib.load_config(name)
    data = dataclasses.replace(config.data, path=str(tmp_path / "own.jsonl"), embeddings=str(tmp_path / "table"))
    read = read_data(read_inputs(dataclasses.replace(config, data=data)))
    assert len(read.train.examples) > 50 and "validation" in read.held_out
