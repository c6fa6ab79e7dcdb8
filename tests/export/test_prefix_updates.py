"""`e2p prefixes` again: what is damaged is mended, and nobody sees half of an update."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import fill

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.prepared import load_table
from e2p_jax.embed.make import make_table
from e2p_jax.errors import UserError
from e2p_jax.export import prefix_table
from e2p_jax.export.client import EngineClient
from e2p_jax.export.engines import export_engine
from e2p_jax.export.payloads import sglang, soft_tokens, tensor_base64
from e2p_jax.export.prefix_files import files_of
from e2p_jax.export.prefix_reader import PrefixTable
from e2p_jax.export.prefix_table import export_prefixes
from e2p_jax.options import EncoderSettings
from e2p_jax.train.run import Run
from e2p_jax.vectors.table import UserTable, save_table

COUNT = 45  # users: six shards, the last one not full
USERS = [f"user-{user}" for user in range(COUNT)]
VECTORS = np.stack([synthetic.vector(user) for user in range(COUNT)])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight users a shard at K=1, D=32, float32."""
    monkeypatch.setattr(prefix_table, "SHARD_BYTES", 8 * 32 * 4)


def with_vectors(run: Run, vectors: np.ndarray, users: list[str] = USERS) -> Run:
    table = UserTable(users, vectors, "here")
    return dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, table=table))


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_rerun_mends_what_is_damaged_or_missing(make_run: Callable, tmp_path: Path):
    run, out = with_vectors(make_run(), VECTORS), tmp_path / "out"
    assert export_prefixes(run, out, "float32").text() == "45 users in 6 shards: 6 projected, 0 kept"
    whole, manifest = held(out), PrefixTable(out).manifest
    shards = [f"{shard['name']}.safetensors" for shard in manifest["shards"]]
    tokens, tokenizer = f"{manifest['tokens']}.tokens.safetensors", f"{manifest['tokenizer']}.tokenizer"
    ids, index = f"{manifest['ids']}.ids.txt", f"{manifest['ids']}.index.npy"
    for name in (shards[2], tokens, f"{tokenizer}/tokenizer.json", ids, index, "manifest.json"):
        flip(out / name)
    (out / shards[4]).write_bytes(whole[shards[4]][:100])
    written = export_prefixes(run, out, "float32")
    assert sorted(written.mended) == sorted([shards[2], shards[4], tokens, tokenizer, ids, index, "manifest.json"])
    assert held(out) == whole and written.projected == 2
    (out / shards[0]).unlink()
    said = export_prefixes(run, out, "float32").text()
    assert said == f"45 users in 6 shards: 1 projected, 5 kept; damaged or missing, and written again: {shards[0]}"
    assert held(out) == whole and export_prefixes(run, out, "float32").mended == ()


def test_a_clock_that_goes_back_keeps_nothing_for_ever(make_run: Callable, tmp_path: Path):
    run, out = make_run(), tmp_path / "out"
    export_prefixes(with_vectors(run, VECTORS), out, "float32")
    before, vectors = set(held(out)), VECTORS.copy()
    vectors[5] += 1
    run = with_vectors(run, vectors)
    export_prefixes(run, out, "float32")
    left = [path for path in out.iterdir() if path.name not in files_of(PrefixTable(out).manifest) | {"manifest.json"}]
    assert sorted(path.name in before for path in left) == [False, True]  # the manifest that was there, and a shard
    for moved in (1e8, -7201.0):  # seconds
        for path in left:
            assert path.exists()
            os.utime(path, (time.time(), time.time() + moved))
        export_prefixes(run, out, "float32", keep_hours=2)
        for path in left:
            assert path.exists() == (moved > 0) and (moved < 0 or path.stat().st_mtime <= time.time())


def test_the_client_refuses_damaged_tokens_and_tokenizers(make_run: Callable, tmp_path: Path):
    run, out = with_vectors(make_run(), VECTORS), tmp_path / "out"
    export_prefixes(run, out, "float32")
    table, messages = PrefixTable(out), [{"role": "user", "content": "hi"}]
    wanted = EngineClient(table, "mine").embeddings("user-1", messages)
    tokens = out / f"{table.manifest['tokens']}.tokens.safetensors"
    data = tokens.read_bytes()
    place = data.index(wanted[-1].tobytes())
    tokens.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(UserError, match=rf"{tokens}: damaged: row \d+ is not what was written; rerun `e2p prefixes`"):
        EngineClient(table, "mine").embeddings("user-1", messages)
    tokens.write_bytes(data)
    flip(out / f"{table.manifest['tokenizer']}.tokenizer" / "tokenizer.json")
    with pytest.raises(UserError, match=r"\.tokenizer: missing or damaged; rerun `e2p prefixes`"):
        EngineClient(table, "mine").embeddings("user-1", messages)


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1e38), ("bfloat16", 1e38), ("float16", 1e38)])
def test_soft_tokens_that_are_not_finite_are_refused(make_run: Callable, tmp_path: Path, dtype: str, factor: float):
    run, out = make_run(), tmp_path / "out"
    export_prefixes(with_vectors(run, VECTORS), out, dtype)
    before, vectors = held(out), VECTORS.copy()
    vectors[5] *= factor
    with pytest.raises(UserError, match=rf"user 'user-5': the soft tokens are not finite in {dtype}; repair or drop"):
        export_prefixes(with_vectors(run, vectors), out, dtype)
    assert held(out) == before


def test_payloads_refuse_what_is_not_finite(make_run: Callable, tmp_path: Path):
    """In their own dtype, and in float16, which a server may cast to whatever it is sent."""
    for dtype, name in [("float16", "float16; repair"), ("float32", "float16, in which an engine may read them; ")]:
        with pytest.raises(UserError, match=f"user 'a': the soft tokens are not finite in {name}"):
            soft_tokens(np.full((1, 4), 1e6, np.float32), np.dtype(dtype), "a")
    for value in (np.nan, -np.inf, 7e4):
        broken = np.ones((3, 4), np.float32)
        broken[1, 2] = value
        for make in (tensor_base64, lambda embeddings: sglang(embeddings, ())):
            with pytest.raises(UserError, match="embedding 1 of a request is not finite in float16"):
                make(broken)
    vectors = VECTORS.copy()
    vectors[5] *= 1e38
    for format in ("vllm", "sglang"):
        with pytest.raises(UserError, match="user 'user-5': the soft tokens are not finite in float32"):
            export_engine(with_vectors(make_run(), vectors), format, ["user-5"], "hi")


def test_out_is_refused_and_left_as_it_is(make_run: Callable, tmp_path: Path):
    run, vectors = with_vectors(make_run(), VECTORS), tmp_path / "vectors"
    save_table(vectors, USERS, VECTORS, name="taste", version="1")
    (tmp_path / "file").write_text("mine")
    others = {"foreign": "manifest.json", "template": "chat_template.jinja", "half": ".notes.tmp", "older": "tokenizer"}
    for folder, name in others.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text('{"shards": 1, "format": "another"}')
    before = held(tmp_path)
    refused = {"file": "is a file", "vectors": "holds other files", "x" * 300: "File name too long"}
    refused |= {"file/below": "Not a directory"} | dict.fromkeys(others, "holds other files")
    for name, reason in refused.items():
        with pytest.raises(UserError, match=rf"--out {tmp_path / name}: {reason}.*; choose a"):
            export_prefixes(run, tmp_path / name, "float32")
        assert held(tmp_path) == before


@pytest.mark.parametrize("user", ["a\nb", "a\r"])
def test_ids_that_do_not_fit_on_a_line_leave_nothing(make_run: Callable, tmp_path: Path, user: str):
    run = with_vectors(make_run(), VECTORS[:2], ["a", user])
    with pytest.raises(UserError, match=r"here: user id '.*' holds a line break; rename that user"):
        export_prefixes(run, tmp_path / "out", "float32")
    assert held(tmp_path) == {}


READER = """
import resource, sys
from pathlib import Path
import numpy as np
from e2p_jax.export.prefix_reader import PrefixTable
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 40))
out, users, versions = Path(sys.argv[1]), [f"user-{user}" for user in range(45)], np.load(sys.argv[2])
first, newest, opened = PrefixTable(out), 0, 0  # of six shards it keeps five open
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
table = first
print("ready", flush=True)
while newest < len(versions) - 1:
    assert np.array_equal(first.lookup(users), versions[0]), "the table that was open"
    table = table.reload()
    rows = table.lookup(users)
    (found,) = [version for version, wanted in enumerate(versions) if np.array_equal(rows, wanted)] or ["half"]
    assert found != "half" and found >= newest, (found, newest)
    newest, opened = found, opened + 1
print(opened)
"""


def test_readers_never_see_half_an_update(make_run: Callable, tmp_path: Path):
    """A process reads all the time while versions land that remove what is not held; it holds on to the first one."""
    run, out, random = make_run(), tmp_path / "out", np.random.default_rng(0)
    vectors, versions = [VECTORS], []
    for _ in range(5):
        vectors.append(vectors[-1].copy())
        vectors[-1][random.integers(COUNT, size=4)] += 0.5
    for number, each in enumerate(vectors):
        export_prefixes(with_vectors(run, each), tmp_path / f"apart-{number}", "float32")
        versions.append(PrefixTable(tmp_path / f"apart-{number}").lookup(USERS))
    np.save(tmp_path / "versions.npy", np.stack(versions))
    export_prefixes(with_vectors(run, vectors[0]), out, "float32")
    command = [sys.executable, "-c", READER, str(out), str(tmp_path / "versions.npy")]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=os.environ) as reader:
        assert reader.stdout and reader.stdout.readline() == "ready\n"
        for each in vectors[1:]:
            export_prefixes(with_vectors(run, each), out, "float32", keep_hours=0)
        said, complaint = reader.communicate(timeout=120)
    assert reader.returncode == 0 and int(said) > 5, complaint
    export_prefixes(with_vectors(run, vectors[-1]), out, "float32", keep_hours=0)
    assert held(out) == held(tmp_path / "apart-5")


def test_few_descriptors_are_enough(make_run: Callable, tmp_path: Path):
    """From the command line, where it says what it mended."""
    run, out = with_vectors(make_run(), VECTORS), tmp_path / "out"
    vectors = tmp_path / "vectors"
    save_table(vectors, USERS, VECTORS, name="taste", version="1")
    export_prefixes(run, out, "float32")
    shards = [f"{shard['name']}.safetensors" for shard in PrefixTable(out).manifest["shards"]]
    flip(out / shards[3])
    code = f"""
import resource, sys
from e2p_jax.cli import main
from e2p_jax.export import prefix_table
prefix_table.SHARD_BYTES = {prefix_table.SHARD_BYTES}
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["prefixes", str(run.directory), "--out", str(out), "--embeddings", str(vectors)]
    command = [sys.executable, "-c", code, *arguments, "--dtype", "float32", "--checkpoint", "last"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    said = f"45 users in 6 shards: 1 projected, 5 kept; damaged or missing, and written again: {shards[3]}\n"
    assert done.stderr.endswith(said)


def test_a_full_disk_leaves_the_table_that_was_there(make_run: Callable, disk: Path):
    run, out = make_run(), disk / "out"
    export_prefixes(with_vectors(run, VECTORS), out, "float32")
    before, rows = held(out), PrefixTable(out).lookup(USERS)
    for left in range(0, 24_577, 4096):  # a shard fits, two, ..., the index does not
        fill(disk, left)
        with pytest.raises(UserError, match=rf"^{out}: no space left on the device; what was saved before is whole\. "):
            export_prefixes(with_vectors(run, VECTORS + 1, [f"{user}-new" for user in USERS]), out, "float32")
        (disk / "filler").unlink()
        assert not list(out.glob(".*")) and held(out).items() >= before.items()
        assert np.array_equal(PrefixTable(out).lookup(USERS), rows)
    assert export_prefixes(with_vectors(run, VECTORS), out, "float32", keep_hours=0).projected == 0
    assert held(out) == before


def test_a_full_disk_leaves_the_table_of_vectors_that_was_there(disk: Path, tmp_path: Path):
    out, settings = disk / "vectors", EncoderSettings()
    for version, factor in (("1", 1), ("2", 2)):
        save_table(tmp_path / version, USERS, VECTORS * np.float32(factor), name="taste", version=version)
    make_table(str(tmp_path / "1"), "import", out, settings)
    before = held(disk)
    for left in (0, 4096, 16_384):
        fill(disk, left)
        with pytest.raises(UserError, match=rf"^{out}: .*[Nn]o space left on (the )?device"):
            make_table(str(tmp_path / "2"), "import", out, settings)
        (disk / "filler").unlink()
        assert held(disk) == before
    (out / "index.npy").unlink()
    fill(disk, 0)  # no room for the index: it is made in memory
    assert np.array_equal(load_table(str(out)).lookup(["user-7"], ["here"]), VECTORS[[7]])
    assert sorted(path.name for path in out.iterdir()) == ["embeddings.npy", "ids.txt", "meta.json"]
