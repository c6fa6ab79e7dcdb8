"""What a run stands on is written down once, and whatever of it changes is named when the run is opened."""

import dataclasses
import json
import random
import shutil
import typing
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from other_values import another

from e2p_jax.backbone.families import read_config
from e2p_jax.backbone.tensor_files import fingerprint
from e2p_jax.config import BackboneConfig, Config, DataConfig, from_json
from e2p_jax.config_fields import fields_that
from e2p_jax.data.control import unguarded
from e2p_jax.errors import UserError
from e2p_jax.json_files import sealed
from e2p_jax.tensors import read_tensors
from e2p_jax.train import identity
from e2p_jax.train.run import claim_run, open_run
from e2p_jax.train.setup import Inputs, Model, build_model, read_inputs
from e2p_jax.vectors.population import Population

FIELDS = [f"{section}.{name}" for section, values in dataclasses.asdict(Config()).items() for name in values]
FIELDS.remove("backbone.ignored_keys")  # what it names must be in the backbone's config.json, or that is refused
OPENS = "no checkpoint yet"  # nothing was trained: all that stands before the checkpoint was in order


@pytest.fixture(scope="module")
def begun(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Inputs, Model]:
    """A folder with a backbone and a run in front of it, claimed and not trained."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_backbone, folder / "backbone")
    config = Config(backbone=BackboneConfig(path=str(folder / "backbone")), data=DataConfig(seq_len=128)).resolved()
    inputs = read_inputs(config)
    model = build_model(inputs, Population.standard(4))
    claim_run(epath.Path(folder / "run"), config, inputs, model)
    return folder, inputs, model


@pytest.fixture
def folder(begun: tuple[Path, Inputs, Model], tmp_path: Path) -> Path:
    """The same, to be changed: a copy of both, the run naming the copy of the backbone."""
    for name in ("backbone", "run"):
        shutil.copytree(begun[0] / name, tmp_path / name)
    edit(tmp_path / "run" / "config.json", lambda values: values["backbone"].update(path=str(tmp_path / "backbone")))
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(run: Path) -> str:
    with pytest.raises(UserError) as error:
        open_run(run)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_opens_as_it_was_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever its backbone lies now."""
    assert OPENS in refused(folder / "run")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_compared_on_resume_where_it_changes_the_result(
    folder: Path, begun: tuple[Path, Inputs, Model], capsys: pytest.CaptureFixture[str], field: str
) -> None:
    """It is refused, or taken silently; either way nothing is written before training goes on."""
    _, inputs, model = begun
    path, (section, name) = folder / "run" / "config.json", field.split(".")
    config = from_json(path.read_bytes(), path)
    values = getattr(config, section)
    value = another(getattr(values, name), typing.get_type_hints(type(values), include_extras=True)[name])
    changed = dataclasses.replace(config, **{section: dataclasses.replace(values, **{name: value})})
    if name in fields_that("result", values):
        with pytest.raises(UserError) as error:
            claim_run(epath.Path(folder / "run"), changed, inputs, model)
        said = f"({field}: {json.loads(config.to_json())[section][name]!r} there, "
        assert said in str(error.value) and str(error.value).count(" there, ") == 1
    else:
        claim_run(epath.Path(folder / "run"), changed, inputs, model)
        assert not capsys.readouterr().err
    assert from_json(path.read_bytes(), path) == config


def test_what_has_no_say_may_change(folder: Path) -> None:
    """Bookkeeping of config.json, the dialect it is written in, the layout of tokenizer.json."""
    edit(folder / "backbone" / "config.json", lambda values: values.update(_name_or_path="x", transformers_version="9"))
    edit(folder / "backbone" / "config.json", lambda values: values.update(torch_dtype="float32", use_cache=False))
    edit(
        folder / "backbone" / "config.json",
        lambda values: values.update(rope_parameters={"rope_type": "default", "rope_theta": values.pop("rope_theta")}),
    )
    edit(folder / "backbone" / "tokenizer.json", lambda values: None)
    assert OPENS in refused(folder / "run")


@pytest.mark.parametrize(
    ("key", "value", "was"), [("rope_theta", 500_000.0, "10000.0"), ("rms_norm_eps", 0.1, "1e-05")]
)
def test_another_config_json_is_named_by_its_keys(folder: Path, key: str, value: float, was: str) -> None:
    edit(folder / "backbone" / "config.json", lambda values: values.update({key: value}))
    said = refused(folder / "run")
    assert said.startswith(f"{folder / 'backbone' / 'config.json'}: changed since {folder / 'run'} was trained")
    assert f"{key} was {was}, is {value}" in said and said.count(" was ") == 2


def add_token(directory: Path) -> None:
    token = {"id": 4095, "content": "<|more|>", "single_word": False, "lstrip": False, "rstrip": False}
    edit(
        directory / "tokenizer.json",
        lambda values: values["added_tokens"].append(token | {"normalized": False, "special": True}),
    )


def swap_merges(directory: Path) -> None:
    def swap(values: dict[str, Any]) -> None:
        merges = values["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    edit(directory / "tokenizer.json", swap)


def other_eos(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", lambda values: values.update(eos_token=values["bos_token"]))


@pytest.mark.parametrize("change", [add_token, swap_merges, other_eos])
def test_another_tokenizer_is_named(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder / "backbone")
    assert f"{folder / 'backbone'}: the tokenizer (" in refused(folder / "run")


def test_another_chat_template_is_named(folder: Path) -> None:
    path = folder / "backbone" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    said = refused(folder / "run")
    assert said.startswith(f"{path}: the chat template changed") and str(folder / "run" / path.name) in said
    shutil.copyfile(folder / "run" / path.name, path)  # what it says
    assert OPENS in refused(folder / "run")


def test_the_runs_own_template_is_not_altered_unseen(folder: Path) -> None:
    path = folder / "run" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    said = refused(folder / "run")
    assert f"{path}: is not the chat template that the run was trained with; delete it" in said
    path.unlink()
    assert OPENS in refused(folder / "run")


def test_resuming_checks_the_same(folder: Path, begun: tuple[Path, Inputs, Model]) -> None:
    _, _, model = begun
    edit(folder / "backbone" / "config.json", lambda values: values.update(rope_theta=5e5))
    config = from_json((folder / "run" / "config.json").read_text(), folder)
    with pytest.raises(UserError, match="rope_theta was 10000"):
        claim_run(epath.Path(folder / "run"), config, read_inputs(config), model)


@pytest.mark.parametrize(
    ("section", "gone"),
    [
        ("train", {"distill": 0.0, "teacher_tokens": 16, "borrowed": 0}),
        ("train", {"distill": 0.9, "teacher_tokens": 16, "borrowed": 0}),
        ("projector", {"shrink": 0.0}),
        ("projector", {"shrink": 0.2}),
    ],
)
def test_a_run_that_learned_by_what_is_gone_opens_and_is_not_trained_further(
    folder: Path, begun: tuple[Path, Inputs, Model], section: str, gone: dict[str, float]
) -> None:
    """As an earlier version wrote both files; where it was 0 it is any run."""
    _, inputs, model = begun
    path = folder / "run" / "config.json"
    edit(path, lambda values: values[section].update(gone))
    names = identity.read(epath.Path(folder / "run"))
    names["settings"][section] |= gone
    (folder / "run" / "backbone.json").write_text(sealed(names))
    assert OPENS in refused(folder / "run")
    first, share = next(iter(gone.items()))
    further = pytest.raises(UserError, match=rf"{section}\.{first}, which this version") if share else nullcontext()
    with further:
        claim_run(epath.Path(folder / "run"), from_json(path.read_bytes(), path), inputs, model)


def test_settings_that_checkpoints_depend_on_cannot_be_edited(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "run" / "config.json"
    edit(path, lambda values: values["train"].update(steps=900))
    assert OPENS in refused(folder / "run")
    assert "train.steps is 900, was 1000 when the run was begun" in capsys.readouterr().err
    edit(path, lambda values: values["prefix"].update(placement="in_chat"))
    assert "prefix.placement is 'in_chat', was 'after_bos'" in refused(folder / "run")


def test_a_run_of_an_earlier_version_opens_and_says_what_was_not_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "run" / "backbone.json"
    names = json.loads(path.read_text())
    old = {key: names[key] for key in ("path", "revision", "fingerprint", "embedding_width")}
    path.write_text(json.dumps(old, indent=2) + "\n")
    assert OPENS in refused(folder / "run")
    said = capsys.readouterr().err
    assert "config.json, tokenizer and chat template" in said and said.count("\n") == 1
    template = folder / "run" / "chat_template.jinja"
    template.write_text(
        unguarded(template.read_text())
    )  # as it was written then: nothing kept text from becoming tokens
    assert OPENS in refused(folder / "run")
    template.write_text(template.read_text() + " ")
    assert f"{folder / 'backbone' / template.name}: the chat template changed" in refused(folder / "run")
    template.unlink()
    path.write_text(json.dumps(old | {"fingerprint": "0" * 64}))
    assert "was trained in front of other weights" in refused(folder / "run")
    path.write_text(json.dumps(old | {"tokenizer": names["tokenizer"]}))  # no version wrote that
    assert f"{path}: damaged or altered" in refused(folder / "run")


NASTY: list[Any] = [None, True, 0, -1, 1.5, 2**31, 10**400, "", "x", [], {}, [[]], {"a": 1}, "\ud800", "y" * 5000]

INSERTED = [b"{", b"[" * 9000, b"null", b"NaN", b"-", b"9", b"\xff", b'"', b","]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One change: to a byte, to a span, or, where it is JSON, to a value."""
    kind, place = rng.randrange(7), rng.randrange(len(data))
    if kind == 0:
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:place] + data[place + rng.randrange(1, 20) :]
    if kind == 3:
        return data[:place] + rng.choice(INSERTED) + data[place:]
    if kind == 4:
        end = place + rng.randrange(1, 60)
        return data[:end] + data[place:]
    try:
        values = json.loads(data)
    except ValueError:
        return data[:place] + rng.randbytes(4) + data[place + 4 :]
    inside: Any = values
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = rng.choice(keys)
        if not isinstance(inside[key], dict | list) or not inside[key] or rng.random() < 0.2:
            break
        inside = inside[key]
    if kind == 5 and isinstance(inside, dict):
        inside[f"{key}_"] = inside.pop(key)
    else:
        inside[key] = rng.choice(NASTY)
    return json.dumps(values).encode()


def test_mutated_files_are_refused_or_say_what_they_are(
    begun: tuple[Path, Inputs, Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """300 changes to each of a run's config.json and backbone.json, to a backbone's config.json and to safetensors.

    None ends in anything but a `UserError` of one line, and whatever can still be read is what was written, or it is
    said, or the backbone's identity is another. What changes no result is free to be edited.
    """
    folder, inputs, _ = begun
    run, rng = epath.Path(folder / "run"), random.Random(14)
    names, config = identity.read(run), inputs.config
    tensors = fingerprint(read_tensors(folder / "backbone" / "model.safetensors", ""))
    outcomes: dict[str, int] = {}

    def opened(place: Path, kind: str) -> str:
        if kind == "safetensors":
            return "same" if fingerprint(read_tensors(place / "file", "remedy")) == tensors else "another identity"
        if kind == "backbone":
            found = dataclasses.replace(inputs, decoder=read_config(place), directory=place)
            same = found.decoder == inputs.decoder
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(folder / "backbone" / name, place / name)
            try:
                identity.check_inputs(run, names, config, found)
            except UserError as error:
                assert not same and "config.json: changed since" in str(error)
                return "another identity"
            assert same
            return "same"
        if kind == "names":
            (place / "backbone.json").write_bytes((place / "file").read_bytes())
            assert identity.read(epath.Path(place)) == names
            return "same"
        read = from_json((place / "file").read_bytes(), place / "file")
        capsys.readouterr()
        identity.check_inputs(run, names, read, inputs)
        if capsys.readouterr().err:
            return "said"
        assert identity.settings(read) == identity.settings(config)
        return "same"

    sources = {
        "safetensors": folder / "backbone" / "model.safetensors",
        "backbone": folder / "backbone" / "config.json",
        "names": folder / "run" / "backbone.json",
        "config": folder / "run" / "config.json",
    }
    for kind, source in sources.items():
        (tmp_path / kind).mkdir()
        data = source.read_bytes()
        header = data.index(b"}}") + 2 if kind == "safetensors" else len(data)
        for number in range(300):
            end = header if number % 3 else len(data)
            changed = mutate(data[:end], rng) + data[end:]
            (tmp_path / kind / ("config.json" if kind == "backbone" else "file")).write_bytes(changed)
            try:
                outcome = opened(tmp_path / kind, kind)
            except UserError as error:
                assert "\n" not in str(error), str(error)
                outcome = "refused"
            outcomes[f"{kind}: {outcome}"] = outcomes.get(f"{kind}: {outcome}", 0) + 1
    assert outcomes["names: refused"] > 200 and outcomes["config: said"] > 0, outcomes
    assert outcomes["backbone: another identity"] > 0 and outcomes["safetensors: refused"] > 100, outcomes
