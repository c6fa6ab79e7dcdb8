"""SIGKILL at random moments: the command is run again until it succeeds, and ends as if nothing had been.

Each command once in an ordinary run of the tests; with E2P_TEST_KILLS=50 fifty times.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from etils import epath
from xla_flags import xla_flags

from benchmarks.releases import interactions
from e2p_jax.backbone.convert import hugging_face_tensors
from e2p_jax.backbone.weights import open_checkpoint
from e2p_jax.config import Config
from e2p_jax.datasets import synthetic
from e2p_jax.export.prefix_reader import PrefixTable
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.run import open_run
from e2p_jax.vectors.table import save_table

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("E2P_TEST_KILLS", "1"))
FEW = ("prepare", "import", "data")  # the others take more than a second of processor time each
TEN_YEARS = 315e6  # seconds
PREPARED = "prepared/interactions/leave_last_out/1.0.0"
MODULES = """cli datasets.prepare datasets.interactions.interactions_dataset_builder
embed.make embed.collaborative embed.hidden_states train.loop evaluate.compare export.transformers export.peft
export.engines export.weights export.prefix_table backbone.convert report.report""".split()  # noqa: SIM905 (as one would type them)


class Ended(NamedTuple):
    """A call."""

    code: int
    seconds: float
    cpu_seconds: float
    changes: int  # to the disk, that Python made; 0 if it was killed
    said: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Killable:
    """Functions in processes that can be killed."""

    def __init__(self, modules: Sequence[str], log: Path):
        command = [sys.executable, str(Path(__file__).with_name("killable.py")), *modules]
        self._server = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        self._log = log

    def call(
        self,
        module: str,
        function: str,
        *arguments: Any,
        change: int | None = None,
        seconds: float | None = None,
        **environment: str,
    ) -> Ended:
        """Killed before the nth change to the disk, or after seconds, if these are given."""
        asked = {"module": module, "function": function, "arguments": arguments, "log": str(self._log)}
        asked |= {"change": change, "seconds": seconds, "environment": environment}
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        ended = Ended(*json.loads(self._server.stdout.readline()), said=self._log.read_text())
        assert "Traceback" not in ended.said or module != "e2p_jax.cli", ended.said
        return ended

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def contents(directory: Path) -> dict[str, Any]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def writer(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Killable]:
    environment.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
    killable = Killable(["writing"], tmp_path / "log")
    yield killable
    killable.close()


def test_replacing_a_directory_loses_and_leaves_nothing(writer: Killable, tmp_path: Path) -> None:
    """Killed before each thing that it does to the disk: what was there is there, before or after the next call."""
    out, old, new = tmp_path / "place" / "out", {"a": b"old", "deep/b": b"old"}, {"a": b"new", "deep/b": b"new"}
    changes = writer.call("writing", "write", str(out), "old").changes
    assert contents(out.parent) == {f"out/{name}": data for name, data in old.items()}
    for change in range(1, changes + 6):
        writer.call("writing", "write", str(out), "old")
        if writer.call("writing", "write", str(out), "new", change=change).killed:
            assert writer.call("writing", "fail", str(out)).code == 99
            assert contents(out) in (old, new)
            assert writer.call("writing", "write", str(out), "new").code == 0
        assert contents(out.parent) == {f"out/{name}": data for name, data in new.items()}
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert change > changes


def test_replacing_a_file_loses_and_leaves_nothing(writer: Killable, tmp_path: Path) -> None:
    """Killed before each thing that it does to the disk."""
    path = tmp_path / "place" / "file"
    assert writer.call("writing", "write_file", str(path), "old").code == 0
    change, killed = 0, True
    while killed:
        change += 1
        killed = writer.call("writing", "write_file", str(path), "new", change=change).killed
        assert path.read_text() in ("old", "new")
        assert writer.call("writing", "write_file", str(path), "old").code == 0
        assert contents(path.parent) == {"file": b"old"}
    assert change > 2


def test_several_processes_write_one_file(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    """Whole by whole, none is in another's way."""
    environment.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
    path, texts = tmp_path / "file", [letter * 100_000 for letter in "abc"]
    path.write_text(texts[0])
    program = "import sys, writing; writing.write_file(sys.argv[1], sys.argv[2] * 100_000, 200)"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), text[0]]) for text in texts]
    read = set()
    while any(writer.poll() is None for writer in writers):
        read.add(path.read_text())
    assert read <= set(texts)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def run_contents(run: Path) -> dict[str, Any]:
    """What of a run is promised: all but what the clock says."""
    lines = read_metrics(epath.Path(run / "metrics.jsonl"))
    found: dict[str, Any] = {"metrics": [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]}
    found |= {name: (run / name).read_text() for name in ("config.json", "backbone.json", "chat_template.jinja")}
    if (run / "report" / "evaluation.json").exists():  # e2p train writes it, e2p compare does not
        found["evaluation"] = json.loads((run / "report" / "evaluation.json").read_text())
    for which in ("last", "best"):
        opened = open_run(str(run), which)
        parameters = opened.model.params["projector"].items()
        found |= {f"{which} {name}": np.asarray(value).tobytes() for name, value in parameters}
    return found


def comparison_contents(directory: Path) -> dict[str, Any]:
    """Scores without their key, which covers the checkpoint's files, whose names are random."""
    found = contents(directory / "report")
    for run in ("e2p", "static"):
        scores = np.load(directory / "scores" / f"{run}.npz")
        found |= {f"{run} {name}": scores[name].tobytes() for name in scores.files if name != "key"}
        found[run] = run_contents(directory / run)
    return found


def flax_contents(directory: Path) -> dict[str, Any]:
    """Orbax gives its files random names."""
    checkpoint = open_checkpoint(directory)
    found: dict[str, Any] = {name: data for name, data in contents(directory).items() if not name.startswith("params/")}
    found |= {name: np.asarray(tensor).tobytes() for name, tensor in hugging_face_tensors(directory)}
    return found | {"fingerprint": checkpoint.fingerprint()}


def report_contents(directory: Path) -> dict[str, Any]:
    """Without what it measures by the clock."""
    return {name: data for name, data in contents(directory).items() if "cost" not in name and name != "index.html"}


def cache_contents(out: Path) -> dict[str, Any]:
    """Of a command that writes nothing else."""
    return contents(out.parent.parent / "home" / "cache")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, and what of its output must be equal."""

    arguments: str
    compared: Callable[[Path], dict[str, Any]] = contents


ENGINE = "--user user-1 user-2 --prompt hi"
CASES = {
    "train": Case("train {config} --workdir {out}", run_contents),
    "prefixes": Case("prefixes {run} --out {out}"),
    "transformers": Case("export {run} --out {out} --include-backbone"),
    "peft": Case("export {run} --out {out} --format peft --user user-1 user-2"),
    "vllm": Case(f"export {{run}} --out {{out}}/body --format vllm {ENGINE}"),
    "sglang": Case(f"export {{run}} --out {{out}}/body --format sglang {ENGINE}"),
    "backbone": Case("export {tuned} --out {out} --format backbone"),
    "prepare": Case("prepare interactions --manual-dir {release} --data-dir {out}"),
    "als": Case("embed --data {prepared} --encoder als --width 4 --out {out}"),
    "svd": Case("embed --data {prepared} --encoder svd --width 4 --out {out}"),
    "import": Case("embed --data {release}/vectors.npz --encoder import --out {out}"),
    "of-backbone": Case("embed --data {records} --encoder backbone --backbone {backbone} --out {out}"),
    "data": Case("data show {config}", cache_contents),
    "compare": Case("compare {config} --workdir {out} --conditions none e2p static", comparison_contents),
    "convert": Case("convert {backbone} --out {out}", flax_contents),
    "report": Case("report {run} --out {out}", report_contents),
}


class Commands:
    """The command line, in processes that can be killed."""

    def __init__(self, folder: Path, config: Config, backbone: Path):
        settings = dataclasses.replace(config.train, steps=6, eval_every=3, checkpoint_every=2)
        evaluate = dataclasses.replace(config.evaluate, bootstrap_samples=20, conditions=("none", "e2p"))
        config = dataclasses.replace(config, train=settings, evaluate=evaluate)
        (folder / "config.json").write_text(config.to_json())
        interactions.write(folder / "release", users=30, items=40, plays=8)
        self._folder, self._backbone = folder, backbone
        self._records = config.data.path
        self._killable = Killable([*(f"e2p_jax.{name}" for name in MODULES), "writing"], folder / "log")

    def run(self, arguments: str, out: Path, home: Path, *, small_shards: bool = False, **kill: Any) -> Ended:
        """What it keeps for itself, and for a moment, lies in `home`."""
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        places = {"config": "config.json", "run": "run", "tuned": "tuned", "release": "release", "prepared": PREPARED}
        paths = {name: self._folder / place for name, place in places.items()}
        paths |= {"records": self._records, "backbone": self._backbone, "out": out}
        words = [word.format(**paths) for word in arguments.split()]
        environment = {"XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home / "tmp")}
        if small_shards:
            return self._killable.call("writing", "prefixes_in_small_shards", words[1:], **environment, **kill)
        return self._killable.call("e2p_jax.cli", "main", words, **environment, **kill)

    def need(self, name: str) -> None:
        """Makes what other commands read."""
        made = {"{run}": ("train", "run"), "{tuned}": ("tune", "tuned"), "{prepared}": ("prepare", "prepared")}
        command, place = made[name]
        if (self._folder / place).exists():
            return
        tune = f"{CASES['train'].arguments} --train.trainable projector/** backbone/**"
        ended = self.run(
            tune if command == "tune" else CASES[command].arguments, self._folder / place, self._folder / "home"
        )
        assert ended.code == 0, ended.said

    def close(self) -> None:
        self._killable.close()


@pytest.fixture(scope="module")
def commands(tiny_backbone: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("XLA_FLAGS", xla_flags(devices=1))
        made = Commands(tmp_path_factory.mktemp("kills"), config, tiny_backbone)
        yield made
        made.close()


def names(directory: Path) -> set[str]:
    """Of all that lies there, without what is random or a moment's in them.

    A run that was killed before it removed a checkpoint of before keeps that until its next one.
    """
    found = (str(path.relative_to(directory)) for path in directory.rglob("*"))
    found = (re.sub(r"/checkpoints/[0-9]+(?=/|$)", "/checkpoints/step", name) for name in found)
    return {re.sub(r"\.tfevents\..*", ".tfevents", re.sub("[0-9a-f]{32,}", "#", name)) for name in found}


def lasting(out: Path) -> dict[str, Any]:
    """What was there before a command was killed; between two renames it has another name."""
    aside = out.with_name(f".{out.name}.writing") / "old"
    place = out if out.exists() or not aside.exists() else aside
    return {name: data for name, data in contents(place).items() if not re.match(r"(.*/)?(\.lock$|tensorboard/)", name)}


@pytest.mark.parametrize("name", CASES if KILLS > 1 else FEW)
def test_a_killed_command_ends_as_if_nothing_had_been(commands: Commands, tmp_path: Path, name: str) -> None:
    """Half of the kills over nothing, half over what it had made; half by the clock, half at a change to the disk.

    Before it is run again the clock goes back: all that is there is of the future, and in another order.
    """
    case, random = CASES[name], np.random.default_rng(KILLS)
    for place in set(re.findall(r"{(?:run|tuned|prepared)}", case.arguments)):
        commands.need(place)
    unbroken = commands.run(case.arguments, tmp_path / "place" / "out", tmp_path / "home")
    assert unbroken.code == 0, unbroken.said
    expected, there = case.compared(tmp_path / "place" / "out"), names(tmp_path)
    costs, rerun = [unbroken.cpu_seconds], unbroken
    for number in range(max(KILLS // 10, 1)):
        broken = tmp_path.with_name(f"{tmp_path.name}-{number}")
        out, home, over = broken / "place" / "out", broken / "home", bool(number % 2)
        if over:
            shutil.copytree(tmp_path, broken)
        before = lasting(out)
        last, kill = rerun if over else unbroken, dict[str, Any]()
        if number % 4 < 2:
            kill["change"] = int(random.integers(1, max(last.changes, 1) + 1))
        else:
            kill["seconds"] = float(random.uniform(0, last.seconds))
        killed = commands.run(case.arguments, out, home, **kill)
        print(f"{name} {'again' if over else 'anew'} {kill}: {killed.code} after {killed.seconds:.2f} s")
        if over:
            assert before.items() <= lasting(out).items() or case.compared(out) == expected, kill
        for path in broken.rglob("*"):
            os.utime(path, (time.time(), time.time() + TEN_YEARS * random.uniform(1, 2)), follow_symlinks=False)
        rerun = commands.run(case.arguments, out, home)
        assert rerun.code == 0, (kill, rerun.said)
        found = case.compared(out)
        assert {key for key in found | expected if found.get(key) != expected.get(key)} == set(), kill
        assert names(broken) == there, kill
        costs += [killed.cpu_seconds, rerun.cpu_seconds]
    print(f"{name}: {sum(costs):.1f} CPU s")


def test_a_killed_update_of_prefixes_ends_as_an_unbroken_one(commands: Commands, tmp_path: Path) -> None:
    """Vectors have changed, shards are many: half of the kills over nothing, half over the table of before."""
    commands.need("{run}")
    random, users = np.random.default_rng(KILLS), [f"user-{user}" for user in range(30)]
    vectors = np.stack([synthetic.vector(user) for user in range(30)])
    save_table(tmp_path / "vectors-0", users, vectors, name="taste", version="0")
    vectors[::7] += 1
    save_table(tmp_path / "vectors-1", users, vectors, name="taste", version="1")
    whole, last = [dict[str, Any](), dict[str, Any]()], list[Ended]()

    def project(version: int, out: Path, **kill: Any) -> Ended:
        arguments = f"prefixes {{run}} --out {{out}} --embeddings {tmp_path}/vectors-{version}"
        return commands.run(arguments, out, tmp_path / "home", small_shards=True, **kill)

    for version in (0, 1):
        last.append(project(version, tmp_path / "unbroken"))
        assert last[-1].code == 0, last[-1].said
        whole[version] = contents(tmp_path / "unbroken")
        if version == 0:
            shutil.copytree(tmp_path / "unbroken", tmp_path / "before")
    assert len([name for name in whole[0] if name.endswith(".safetensors")]) == 8 + 2  # tokens, projector
    tables = [PrefixTable(tmp_path / place).lookup(users) for place in ("before", "unbroken")]
    killed = 0
    for number in range(KILLS) if KILLS > 1 else (1,):
        out, version = tmp_path / f"out-{number}", number % 2
        if version:
            shutil.copytree(tmp_path / "before", out)
        kill: dict[str, Any] = {"change": int(random.integers(1, last[version].changes + 1))}
        if number % 4 > 1:
            kill = {"seconds": float(random.uniform(0.3, 1) * last[version].seconds)}
        killed += project(version, out, **kill).killed
        if version:
            found = PrefixTable(out).lookup(users)
            assert any(np.array_equal(found, table) for table in tables), kill
        ended = project(version, out)
        assert ended.code == 0, (kill, ended.said)
        assert contents(out) == whole[version], kill
        assert version or "again" not in ended.said  # what is only unfinished is not called damaged
    print(f"{killed} were killed")
    assert killed
