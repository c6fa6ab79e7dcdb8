"""Something new of every kind that has a name, from outside the package: a projector, a data set, an arm, an export."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
import transformers
from flax import nnx

from e2p_jax import baselines, registry
from e2p_jax.cli import main
from e2p_jax.config import Config, ProjectorConfig
from e2p_jax.datasets.builder import RecordBuilder
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.prefix.projector import Matrix
from e2p_jax.registry import Choice, Export
from e2p_jax.train.run import Run, open_run
from e2p_jax.vectors.table import save_table

USERS = [f"user-{number}" for number in range(8)]


class Bounded:
    """A projector: tanh of one matrix, times a width that is learned."""

    TORCH_NAMES = {"matrix": "matrix.weight"}  # noqa: RUF012 (as a module has it)
    TORCH = """\
class Bounded(E2PProjector):
    def make_layers(self, config, rows, columns):
        self.matrix = nn.Linear(rows, columns, bias=False)
        self.width = nn.Parameter(torch.ones(columns))

    def apply_layers(self, x):
        return self.width * self.matrix(x).tanh()


PROJECTORS["bounded"] = Bounded
"""

    @staticmethod
    def parameters(rows: int, columns: int, hidden_size: int, matrix: Matrix) -> dict[str, nnx.Param]:
        return {"matrix": matrix(rows, columns, 1.0), "width": nnx.Param(jnp.ones((columns,)))}

    @staticmethod
    def project(projector: Any, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        y = jnp.tanh(x @ projector.matrix[...])
        return y * projector.width[...].reshape((1,) * (y.ndim - 1) + (-1,))


class Riddles(RecordBuilder):
    """A data set: `user,question,answer` lines; the last two users are validation."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "riddles.csv"

    def _info(self) -> tfds.core.DatasetInfo:
        return self._record_info(description="Riddles.")

    def sources(self, directory: Path) -> list[Path]:
        return [directory / "riddles.csv"]

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        lines = self.sources(Path(dl_manager.manual_dir))[0].read_text().splitlines()
        records = [_riddle(*line.split(",")) for line in lines]
        splits = {"train": records[:-2], "validation": records[-2:]}
        return {name: self._generate_examples(rows) for name, rows in splits.items()}


def _riddle(user: str, question: str, answer: str) -> Record:
    return Record(user, (), ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def bounded(config: Config) -> Config:
    """An arm: the same config with the projector above."""
    return dataclasses.replace(config, projector=ProjectorConfig(kind="bounded"))


def export_norms(run: Run, out: Path, users: tuple[str, ...]) -> None:
    """An export that writes a file."""
    out.write_text(json.dumps({"users": users, "kind": run.inputs.config.projector.kind}))


def list_names(run: Run, prompt: str) -> list[dict[str, Any]]:
    """An export that returns lines."""
    return [{"prompt": prompt, "leaves": sorted(run.model.params["projector"])}]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PROJECTORS, "bounded", Choice(f"{__name__}:Bounded", "tanh of a matrix"))
    monkeypatch.setitem(registry.DATASETS, "riddles", Choice(f"{__name__}:Riddles", "riddles"))
    monkeypatch.setitem(registry.EXPORTS, "norms", Export(f"{__name__}:export_norms", "a file"))
    monkeypatch.setitem(registry.EXPORTS, "names", Export(f"{__name__}:list_names", "lines"))
    monkeypatch.setitem(baselines.BASELINES, "bounded", bounded)
    monkeypatch.setitem(baselines.ARMS, "bounded", ("bounded", "e2p"))


@pytest.mark.usefixtures("plugin")
def test_one_of_each_is_added_without_editing_the_package(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "riddles.csv").write_text("".join(f"{user},what am i?,a {user}\n" for user in USERS))
    vectors = np.random.default_rng(0).normal(size=(len(USERS), 4)).astype(np.float32)
    save_table(tmp_path / "table", USERS, vectors, name="made", version="1")

    assert main(["prepare", "riddle", "--manual-dir", str(tmp_path), "--data-dir", str(tmp_path / "data")]) == 1
    assert "there are persona_chat, pens, interactions, riddles" in capsys.readouterr().err
    prepared = ["prepare", "riddles", "--manual-dir", str(tmp_path), "--data-dir", str(tmp_path / "data")]
    assert main(prepared) == 0
    data = capsys.readouterr().out.strip()

    paths = ["--backbone.path", str(tiny_backbone), "--data.path", data, "--data.embeddings", str(tmp_path / "table")]
    small = "--data.seq_len 128 --train.rows 4 --train.steps 2 --train.warmup_steps 1 --evaluate.bootstrap_samples 10"
    work = tmp_path / "compared"
    asked = ["compare", "quickstart", "--conditions", "bounded", "--workdir", str(work), "--json"]
    assert main([*asked, *paths, *small.split()]) == 0
    assert set(json.loads(capsys.readouterr().out)["splits"][0]["conditions"]) == {"bounded"}

    run = str(work / "bounded")
    assert main(["export", run, "--format", "norms", "--out", str(tmp_path / "norms")]) == 1
    assert "--format norms: give --out DIR and --user" in capsys.readouterr().err
    assert main(["export", run, "--format", "norms", "--user", "user-1", "--out", str(tmp_path / "norms")]) == 0
    assert json.loads((tmp_path / "norms").read_text()) == {"users": ["user-1"], "kind": "bounded"}
    capsys.readouterr()
    assert main(["export", run, "--format", "names", "--prompt", "hi"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["prompt"] == "hi" and {"matrix", "width"} <= set(line["leaves"]) and "skip" not in line["leaves"]

    assert main(["export", run, "--out", str(tmp_path / "hf"), "--include-backbone"]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    opened = open_run(work / "bounded", "last", backbone="none")
    ours = nnx.merge(opened.model.graph, opened.model.params).projector(jnp.asarray(vectors))
    with torch.no_grad():
        theirs = exported.projector(torch.tensor(vectors)).numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=1e-6)
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]) == 0
    again = open_run(tmp_path / "back", "last", backbone="none").model.params["projector"]
    np.testing.assert_array_equal(again["matrix"], opened.model.params["projector"]["matrix"])


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("train quickstart", "bounded}"),
        ("compare quickstart", "bounded}"),
        ("export RUN", "norms,names}"),
    ],
)
def test_help_shows_what_was_added(arguments: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments.split(), "--help"])
    assert name in capsys.readouterr().out


def test_what_was_not_added_is_refused_by_the_names_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"projector\.kind is 'bounded'; choose from mlp, linear"):
        Config(projector=ProjectorConfig(kind="bounded")).validate()
    with pytest.raises(SystemExit) as exit:
        main(["export", "RUN", "--format", "norms"])
    assert exit.value.code == 2 and "'transformers', 'peft', 'vllm'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("table", [registry.PROJECTORS, registry.DATASETS, registry.EXPORTS], ids=len)
def test_every_line_names_what_is_there(table: dict[str, Choice]) -> None:
    for choice in table.values():
        choice.load()
