"""Something new of every kind that has a name, from a plugin: `tests/plugin/e2p_riddles`, a file and a line each."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from e2p_jax import baselines, registry
from e2p_jax.backbone.adapter import by_matrix, merge
from e2p_jax.cli import main
from e2p_jax.config import AdapterConfig, Config, ProjectorConfig, TrainConfig, from_json
from e2p_jax.errors import UserError
from e2p_jax.registry import Choice
from e2p_jax.train.optimizer import decays
from e2p_jax.train.run import open_run
from e2p_jax.train.setup import abstract_model, make_mesh
from e2p_jax.vectors.table import open_table

TABLES = (*registry.KINDS.values(), registry.DATASETS, registry.ENCODERS, registry.EXPORTS)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The plugin as an installed package; its entry points."""
    info = tmp_path / "installed" / "e2p_riddles-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: e2p-riddles\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[e2p_jax.plugins]\nriddles = e2p_riddles\n")
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugin"))
    monkeypatch.syspath_prepend(str(info.parent))
    before: list[tuple[dict, dict]] = [(table, dict(table)) for table in (*TABLES, baselines.BASELINES, baselines.ARMS)]
    registry.load_plugins.cache_clear()
    yield info / "entry_points.txt"
    for table, lines in before:
        table.clear()
        table.update(lines)
    registry.load_plugins.cache_clear()
    sys.modules.pop("e2p_riddles", None)  # another test imports it again


def test_one_of_each_is_added_without_editing_the_package(
    plugin: Path, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = [f"user-{number}" for number in range(8)]
    (tmp_path / "riddles.csv").write_text("".join(f"{user},what am i?,a {user}\n" for user in users))
    prepared = ["prepare", "riddles", "--manual-dir", str(tmp_path), "--data-dir", str(tmp_path / "data")]
    assert main(prepared) == 0
    data, table = capsys.readouterr().out.strip(), str(tmp_path / "table")
    assert main(["embed", "--data", data, "--encoder", "lengths", "--out", table, "--seed", "1"]) == 0
    vectors = np.asarray(open_table(Path(table)).vectors)

    paths = ["--backbone.path", str(tiny_backbone), "--data.path", data, "--data.embeddings", table]
    small = "--data.seq_len 128 --train.rows 4 --train.steps 2 --train.warmup_steps 1 --evaluate.bootstrap_samples 10"
    kind = "--projector.power 3 --projector.kind bounded"
    work = tmp_path / "compared"
    capsys.readouterr()
    asked = [*kind.split(), "--conditions", "bounded", "--workdir", str(work), "--json", *paths, *small.split()]
    assert main(["compare", *asked, "quickstart"]) == 0
    assert set(json.loads(capsys.readouterr().out)["splits"][0]["conditions"]) == {"bounded"}

    run = str(work / "bounded")
    assert main(["export", run, "--format", "norms", "--user", "user-1", "--out", str(tmp_path / "norms")]) == 0
    assert json.loads((tmp_path / "norms").read_text()) == {"users": ["user-1"], "kind": "bounded"}
    capsys.readouterr()
    assert main(["export", run, "--format", "names", "--prompt", "hi"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["prompt"] == "hi" and {"matrix", "width"} <= set(line["leaves"]) and "skip" not in line["leaves"]

    assert main(["export", run, "--out", str(tmp_path / "hf"), "--include-backbone"]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    opened = open_run(run, "last")
    model = nnx.merge(opened.model.graph, opened.model.params)
    with torch.no_grad():
        theirs = exported.projector(torch.tensor(vectors)).numpy()
    np.testing.assert_allclose(np.asarray(model.projector(jnp.asarray(vectors))), theirs, rtol=1e-5, atol=1e-6)
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]) == 0
    again = open_run(tmp_path / "back", "last", backbone="none")
    assert again.inputs.config.projector == opened.inputs.config.projector
    np.testing.assert_array_equal(again.model.params["projector"]["matrix"], opened.model.params["projector"]["matrix"])

    adapted = Config(adapter=AdapterConfig(kind="scale"), train=TrainConfig(trainable=("scale/**",)))
    added = abstract_model(adapted, opened.inputs.decoder, 4, make_mesh(adapted.mesh))
    assert all(jax.tree.leaves(added.mask["scale"])) and not any(jax.tree.leaves(added.mask["backbone"]))
    assert {decays(f"scale/{name}", leaf.ndim) for name, leaf in added.params["scale"].items()} == {False}
    scales = by_matrix(
        "scale",
        {name: jnp.linspace(-1.0, 1.0, leaf.size).reshape(leaf.shape) for name, leaf in added.params["scale"].items()},
    )
    x = jnp.ones((1, 4, opened.inputs.decoder.hidden_size))
    places = jnp.arange(4, dtype=jnp.int32)[None]
    beside, _ = model.backbone(x, places, jnp.ones((1, 4), jnp.int32), adapters=scales)
    before, _ = model.backbone(x, places, jnp.ones((1, 4), jnp.int32))
    nnx.update(model.backbone.layers, merge(nnx.to_pure_dict(nnx.state(model.backbone.layers)), scales))
    merged, _ = model.backbone(x, places, jnp.ones((1, 4), jnp.int32))
    np.testing.assert_allclose(np.asarray(beside), np.asarray(merged), rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(beside - before)).max() > 0.1

    plugin.unlink()  # uninstalled: what the run was made with is named
    for table_of in TABLES:
        for name in [name for name, choice in table_of.items() if choice.place.startswith("e2p_riddles")]:
            del table_of[name]
    capsys.readouterr()
    assert main(["evaluate", run]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"e2p: {run}/config.json: projector.kind is 'bounded'; choose from mlp, linear, blocks; the run was made with "
        "the plugin e2p_riddles: install it"
    )


def test_help_shows_what_was_added(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, names in [
        (
            "train quickstart --projector.kind=bounded --adapter.kind scale",
            ["bounded}", "scale: a factor", "power INT", "spread"],
        ),
        ("compare quickstart", ["bounded}"]),
        ("export RUN", ["norms,names}"]),
    ]:
        with pytest.raises(SystemExit):
            main([*arguments.split(), "--help"])
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert all(name in said for name in names), said
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "e2p_jax", "embed", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "lengths: lengths of the texts" in " ".join(done.stdout.replace("│", " ").split())


def test_a_plugin_that_cannot_be_imported_is_named(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin.write_text("[e2p_jax.plugins]\nmine = no_such_module\n")
    assert main(["prepare", "--help"]) == 1
    assert capsys.readouterr().err == (
        "e2p: plugin mine (no_such_module): ModuleNotFoundError: No module named 'no_such_module'; mend it, or "
        "uninstall it\n"
    )


def test_what_was_not_added_is_refused_by_the_names_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"projector\.kind is 'bounded'; choose from mlp, linear"):
        Config(projector=ProjectorConfig(kind="bounded")).validate()
    for wrong, said in [
        (["export", "RUN", "--format", "norms"], "'transformers', 'peft', 'vllm'"),
        (["train", "quickstart", "--projector.kind", "bounded"], "'mlp', 'linear'"),
        (["train", "quickstart", "--projector.kind", "linear", "--projector.dropout", "0"], "--projector.dropout"),
    ]:
        with pytest.raises(SystemExit) as exit:
            main(wrong)
        assert exit.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_configs_of_earlier_versions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A run's is read as it was meant; a flag or a file is told where the field went."""
    adapted = from_json('{"backbone": {"lora_rank": 4}}', Path("config.json"))
    assert adapted.adapter.kind == "lora" and adapted.adapter.rank == 4  # type: ignore[attr-defined]
    old = '{"backbone": {"lora_rank": 0}, "projector": {"kind": "linear", "hidden_size": 512, "dropout": 0.05}}'
    assert from_json(old, Path("config.json")) == Config(projector=ProjectorConfig(kind="linear", max_scale=0.0))
    assert main(["train", "quickstart", "--backbone.lora-rank", "4"]) == 2
    assert "--adapter.kind lora --adapter.rank N now" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(
        "from e2p_jax.config import *\nconfig = Config(projector=ProjectorConfig(dropout=0.1))\n"
    )
    assert main(["train", str(tmp_path / "mine.py")]) == 1
    assert "'dropout'; it is projector=e2p_jax.prefix.mlp.Settings(dropout=...) now" in capsys.readouterr().err


@pytest.mark.parametrize("table", TABLES, ids=len)
def test_every_line_names_what_is_there(table: dict[str, Choice]) -> None:
    for name, choice in table.items():
        found = choice.load()
        if table in registry.KINDS.values():
            assert found.Settings().kind == name
