"""The table of prefixes: exact, resumable, updated where something changed, and refused where it does not fit."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.prepared import load_table
from e2p_jax.errors import UserError
from e2p_jax.export import prefix_table
from e2p_jax.export.parquet import write_parquet
from e2p_jax.export.prefix_reader import PrefixTable, manifest_checksum
from e2p_jax.export.prefix_table import export_prefixes
from e2p_jax.tensors import read_tensors
from e2p_jax.train.run import Run
from e2p_jax.vectors.table import UserTable, save_table

COUNT = 45  # users: six shards, the last one not full


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight users a shard at K=1, D=32, float32."""
    monkeypatch.setattr(prefix_table, "SHARD_BYTES", 8 * 32 * 4)


def with_table(run: Run, folder: Path, vectors: np.ndarray, version: str = "1") -> Run:
    path = folder / f"table-{version}"
    save_table(path, [f"user-{user}" for user in range(len(vectors))], vectors, name="taste", version=version)
    data = dataclasses.replace(run.inputs.config.data, embeddings=str(path))
    config = dataclasses.replace(run.inputs.config, data=data)
    return dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=config, table=load_table(str(path))))


def vectors_of(count: int = COUNT) -> np.ndarray:
    return np.stack([synthetic.vector(user) for user in range(count)])


def by_hand(run: Run, vectors: np.ndarray) -> np.ndarray:
    """The projector's formula (see `Projector`) in NumPy and float64: [N, K, D]."""
    p = {name: np.asarray(value, np.float64) for name, value in run.model.params["projector"].items()}
    x = (vectors - p["input_mean"]) / p["input_std"]
    y = x @ p["skip"] + p["bias"]
    if "up" in p:
        h = x @ p["up"] + p["up_bias"]
        y = y + h / (1 + np.exp(-h)) @ p["down"]
    return p["token_mean"] + p["token_std"] * y.reshape(len(x), -1, len(p["token_mean"]))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """File name -> (when it was written, what it holds)."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(("num_tokens", "kind"), [(1, "mlp"), (3, "linear")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_user_is_projected(
    make_run: Callable, small_shards: None, tmp_path: Path, num_tokens: int, kind: str, dtype: str
):
    assert jax.device_count() == 4
    run = with_table(make_run("after_bos", num_tokens, kind), tmp_path, vectors_of())
    export_prefixes(run, tmp_path / "out", dtype)
    table = PrefixTable(tmp_path / "out", run.model.fingerprint)
    users = [f"user-{user}" for user in range(COUNT)]
    ours, theirs = table.lookup(users), by_hand(run, vectors_of())
    assert len(table) == COUNT and "user-44" in table and "user-45" not in table
    assert ours.dtype == np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    assert np.abs(ours.astype(np.float64) - theirs).max() <= tolerance * np.abs(theirs).max()
    assert np.array_equal(table.lookup(["user-31", "user-8"]), ours[[31, 8]])
    assert len(table.manifest["shards"]) > 1


def test_one_pass_over_all_devices(
    make_run: Callable, small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, seen = prefix_table._write, []

    def look(out: Path, shard: prefix_table.Shard, projected: jax.Array) -> None:
        seen.append((shard.users, projected.shape, len(projected.sharding.device_set), projected.is_fully_replicated))
        write(out, shard, projected)

    monkeypatch.setattr(prefix_table, "_write", look)
    export_prefixes(with_table(make_run(), tmp_path, vectors_of()), tmp_path / "out", "float32")
    assert seen == [(8, (8, 1, 32), 4, False)] * 5 + [(5, (8, 1, 32), 4, False)]


def test_a_small_table_is_computed_small_to_the_same_bytes(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A shard of a narrow model holds half a million users: a table of 45 is not filled up to that."""
    write, seen = prefix_table._write, []

    def look(out: Path, shard: prefix_table.Shard, projected: jax.Array) -> None:
        seen.append(len(projected))
        write(out, shard, projected)

    monkeypatch.setattr(prefix_table, "_write", look)
    run = with_table(make_run(), tmp_path, vectors_of())
    export_prefixes(run, tmp_path / "out", "float32")
    monkeypatch.setattr(prefix_table, "LEAST_ROWS", 1 << 16)
    export_prefixes(run, tmp_path / "large", "float32")
    assert seen == [4096, 1 << 16]
    small, large = contents(tmp_path / "out"), contents(tmp_path / "large")
    assert {name: held for name, (_, held) in small.items()} == {name: held for name, (_, held) in large.items()}


def test_manifest_says_what_it_was_made_of_and_another_projector_makes_another_table(
    make_run: Callable, small_shards: None, tmp_path: Path
):
    run = with_table(make_run(), tmp_path, vectors_of(), "2026-11")
    export_prefixes(run, tmp_path / "out", "float32")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["table"]["name"] == "taste" and manifest["table"]["version"] == "2026-11"
    assert manifest["backbone"]["fingerprint"] == run.model.fingerprint
    assert [shard["users"] for shard in manifest["shards"]] == [8] * 5 + [5]
    projector = {**run.model.params["projector"], "bias": run.model.params["projector"]["bias"] + 1}
    other = dataclasses.replace(
        run, model=dataclasses.replace(run.model, params={**run.model.params, "projector": projector})
    )
    export_prefixes(other, tmp_path / "out", "float32")
    table = PrefixTable(tmp_path / "out")
    assert table.manifest["projector"] != manifest["projector"]
    wanted = by_hand(other, vectors_of())
    assert np.abs(table.lookup(["user-3"])[0] - wanted[3]).max() <= 1e-5 * np.abs(wanted).max()


def test_killed_run_goes_on_and_is_exact(
    make_run: Callable, small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = with_table(make_run(), tmp_path, vectors_of())
    export_prefixes(run, tmp_path / "whole", "float32")
    write, done = prefix_table._write, []

    def dies(*arguments: object) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(arguments)
        write(*arguments)

    monkeypatch.setattr(prefix_table, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        export_prefixes(run, tmp_path / "out", "float32")
    (tmp_path / "out" / f".{'0' * 32}.safetensors.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=r"unfinished; rerun `e2p prefixes`"):
        PrefixTable(tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(prefix_table, "_write", write)
    export_prefixes(run, tmp_path / "out", "float32")
    after, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert {name: held for name, (_, held) in after.items()} == {name: held for name, (_, held) in whole.items()}
    kept = [name for name in before if name.endswith(".safetensors") and after.get(name) == before[name]]
    assert len(kept) == 3


def test_two_processes_write_the_same_table(make_run: Callable, small_shards: None, tmp_path: Path):
    run = with_table(make_run(), tmp_path, vectors_of())
    export_prefixes(run, tmp_path / "alone", "float32")
    code = (
        "import sys\nfrom e2p_jax.cli import main\nfrom e2p_jax.export import prefix_table\n"
        f"prefix_table.SHARD_BYTES = {prefix_table.SHARD_BYTES}\nwrite = prefix_table._write\n"
        "def told(out, shard, *rest):\n    print(shard.name, file=sys.stderr)\n    write(out, shard, *rest)\n"
        "prefix_table._write = told\nsys.exit(main(sys.argv[1:]))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["prefixes", str(run.directory), "--checkpoint", "last", "--dtype", "float32"]
    command += ["--out", str(tmp_path / "out"), "--embeddings", str(run.inputs.config.data.embeddings)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *command, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    named = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in said]
    assert named == [[str(tmp_path / "out")], []]
    shards = [shard["name"] for shard in PrefixTable(tmp_path / "out").manifest["shards"]]
    wrote = [[line for line in err.splitlines() if line in shards] for _, err in said]
    assert wrote == [shards[0::2], shards[1::2]]
    together, alone = contents(tmp_path / "out"), contents(tmp_path / "alone")
    assert {name: held for name, (_, held) in together.items()} == {name: held for name, (_, held) in alone.items()}


def test_update_writes_only_what_changed(make_run: Callable, small_shards: None, tmp_path: Path):
    vectors = vectors_of()
    export_prefixes(with_table(make_run(), tmp_path, vectors), tmp_path / "out", "float32")
    reader, before = PrefixTable(tmp_path / "out"), contents(tmp_path / "out")
    old = reader.lookup(["user-17"])
    changed = np.concatenate([vectors, vectors_of(COUNT + 1)[-1:]])
    changed[17] += 1
    run = with_table(make_run(), tmp_path, changed, "2")
    export_prefixes(run, tmp_path / "out", "float32")
    after = contents(tmp_path / "out")
    new = PrefixTable(tmp_path / "out")
    named = {f"{shard['name']}.safetensors" for shard in new.manifest["shards"]}
    shards = [name for name in after if name in before and name in named]
    assert all(after[name] == before[name] for name in shards)
    assert len(shards) == 4  # all but the third shard and the last
    assert len(after) == len(before) + 2 + 2 + 1  # two shards, ids, index; the old ones with their manifest
    users = [f"user-{user}" for user in range(COUNT + 1)]
    export_prefixes(run, tmp_path / "fresh", "float32")
    assert np.array_equal(new.lookup(users), PrefixTable(tmp_path / "fresh").lookup(users))
    export_prefixes(run, tmp_path / "out", "float32", keep_hours=0)
    assert contents(tmp_path / "out").keys() >= before.keys()  # a reader holds them
    assert new.manifest["table"]["version"] == "2"
    assert np.array_equal(reader.lookup(["user-17"]), old) and not np.array_equal(new.lookup(["user-17"]), old)
    del reader
    export_prefixes(run, tmp_path / "out", "float32", keep_hours=0)
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "fresh").keys()


def test_shards_are_plain_safetensors(make_run: Callable, small_shards: None, tmp_path: Path):
    """Both ways: what the library reads of our files, and what our reader reads of the library's."""
    export_prefixes(with_table(make_run(), tmp_path, vectors_of()), tmp_path / "out", "bfloat16")
    table = PrefixTable(tmp_path / "out")
    name = table.manifest["shards"][1]["name"]
    with safe_open(tmp_path / "out" / f"{name}.safetensors", framework="np") as file:
        theirs = file.get_tensor("prefixes")
    ids = (tmp_path / "out" / f"{table.manifest['ids']}.ids.txt").read_text().splitlines()
    start = table.manifest["shards"][0]["users"]
    assert np.array_equal(table.lookup(ids[start : start + len(theirs)]), theirs) and ids[start] == "user-16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parquet_holds_a_row_a_user(make_run: Callable, small_shards: None, tmp_path: Path, dtype: str):
    vectors, users = vectors_of(), [f"user-{user}" for user in range(COUNT)]
    users[20], vectors[20] = users[3], vectors[3]
    run = make_run("after_bos", 3, "linear")
    run = dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, table=UserTable(users, vectors, "here")))
    export_prefixes(run, tmp_path / "out", dtype)
    table = PrefixTable(tmp_path / "out")
    write_parquet(table, tmp_path / "out.parquet")
    held = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert held.schema.field("prefix").type == pa.list_(pa.float16() if dtype == "float16" else pa.float32(), 3 * 32)
    assert held.schema.metadata[b"num_tokens"] == b"3" and held.schema.metadata[b"width"] == b"32"
    assert held.schema.metadata[b"backbone"].decode() == run.model.fingerprint
    once = users[:20] + users[21:]
    assert held["id"].to_pylist() == once and set(held["version"].to_pylist()) == {table.version}
    rows = held["prefix"].combine_chunks().flatten().to_numpy().reshape(len(once), 3, 32)
    assert np.array_equal(rows, table.lookup(once).astype(rows.dtype))


def test_what_all_users_share_is_stored_once(make_run: Callable, small_shards: None, tmp_path: Path):
    """Every way to read a user's soft tokens has them in their place, behind the user's own."""
    run = with_table(make_run("after_bos", 3, "mlp", null=0.5, shared=2), tmp_path, vectors_of())
    export_prefixes(run, tmp_path / "out", "float32")
    table, users = PrefixTable(tmp_path / "out"), [f"user-{user}" for user in range(COUNT)]
    p = {name: np.asarray(value, np.float64) for name, value in run.model.params["projector"].items()}
    shared = p["token_mean"] + p["token_std"] * p["shared"].reshape(2, -1)
    assert not np.allclose(*shared)
    wanted = np.concatenate([by_hand(run, vectors_of()), np.tile(shared, (COUNT, 1, 1))], axis=1)
    assert wanted.shape == (COUNT, *table.shape) == (COUNT, 3, 32)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * np.abs(wanted).max())
    close(table.lookup(users), wanted)
    close(np.concatenate([rows for _, rows in table.shards()]), wanted)
    close(table.project(vectors_of()), wanted)
    some, found = table.get_many(["nobody", "user-7"])
    close(some[:, 1:], np.stack([shared, shared]))
    assert found.tolist() == [False, True] and not np.allclose(some[0, 0], some[1, 0])
    held = [read_tensors(tmp_path / "out" / f"{shard['name']}.safetensors", "") for shard in table.manifest["shards"]]
    assert [each["prefixes"].shape for each in held] == [(8, 1, 32)] * 5 + [(5, 1, 32)]

    (path,) = (tmp_path / "out").glob("*.projector.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"projector.safetensors: missing or damaged; rerun `e2p prefixes`"):
        PrefixTable(tmp_path / "out")  # every user would have them: known before one is served
    assert export_prefixes(run, tmp_path / "out", "float32").projected == 0
    close(PrefixTable(tmp_path / "out").lookup(users), wanted)


def test_a_table_of_before_is_read(make_run: Callable, small_shards: None, tmp_path: Path):
    """Its shards hold all of a user's soft tokens, and its manifest does not say how many are the user's own."""
    export_prefixes(with_table(make_run("after_bos", 3, "linear"), tmp_path, vectors_of()), tmp_path / "out", "float32")
    table, path = PrefixTable(tmp_path / "out"), tmp_path / "out" / "manifest.json"
    manifest = {name: value for name, value in table.manifest.items() if name != "own_tokens"}
    path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    before = PrefixTable(tmp_path / "out")
    assert "own_tokens" not in before.manifest and before.shape == (3, 32)
    assert np.array_equal(before.lookup(["user-8", "user-31"]), table.lookup(["user-8", "user-31"]))


def test_shared_soft_tokens_that_are_not_finite_are_refused(make_run: Callable, tmp_path: Path):
    run = with_table(make_run("after_bos", 3, "mlp", null=0.5, shared=2), tmp_path, vectors_of())
    projector = run.model.params["projector"] | {"shared": np.full(64, np.inf, np.float32)}
    model = dataclasses.replace(run.model, params=run.model.params | {"projector": projector})
    with pytest.raises(UserError, match="the soft tokens that all users share are not finite in float32; choose a"):
        export_prefixes(dataclasses.replace(run, model=model), tmp_path / "out", "float32")


def test_mismatches_are_refused(make_run: Callable, small_shards: None, tmp_path: Path):
    run = with_table(make_run(), tmp_path, vectors_of())
    out = tmp_path / "out"
    export_prefixes(run, out, "float32")
    table = PrefixTable(out)
    with pytest.raises(UserError, match="'stranger' has no prefix"):
        table.lookup(["user-1", "stranger"])
    with pytest.raises(UserError, match="not ffffffffffff; serve that backbone"):
        PrefixTable(out, "f" * 64)
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, fingerprint="f" * 64))
    with pytest.raises(UserError, match="holds the table of another backbone"):
        export_prefixes(other, out, "float32")
    first, second = (out / f"{shard['name']}.safetensors" for shard in table.manifest["shards"][:2])
    whole = first.read_bytes()
    first.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=f"{first.name}: missing or damaged"):
        PrefixTable(out)
    export_prefixes(run, out, "float32")  # as the message says
    assert first.read_bytes() == whole
    second.write_bytes(prefix_table_of(out, rows=7))
    with pytest.raises(UserError, match=f"{second.name}: holds float32 \\(7, 1, 32\\), manifest.json says"):
        PrefixTable(out)
    ids = out / f"{table.manifest['ids']}.ids.txt"
    ids.write_text(ids.read_text().replace("user-9\n", "user-x\n"))
    with pytest.raises(UserError, match=f"{ids.name}: missing or damaged"):
        PrefixTable(out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        export_prefixes(run, tmp_path / "full", "float32")


def prefix_table_of(out: Path, rows: int) -> bytes:
    """The first shard's file, as it would be with fewer rows."""
    (name,) = (shard["name"] for shard in json.loads((out / "manifest.json").read_text())["shards"][:1])
    held = read_tensors(out / f"{name}.safetensors", "")
    return save({name: np.asarray(tensor)[:rows] for name, tensor in held.items()})


def test_bad_vectors_are_named(make_run: Callable, small_shards: None, tmp_path: Path):
    vectors = vectors_of()
    vectors[20, 3] = np.nan
    with pytest.raises(UserError, match=r"row 20 \(user 'user-20'\)"):
        export_prefixes(with_table(make_run(), tmp_path, vectors), tmp_path / "out", "float32")
    run = make_run()
    broken = dataclasses.replace(run.inputs, table=UserTable(["a", "b\nc"], vectors[:2], "here"))
    with pytest.raises(UserError, match="line break"):
        export_prefixes(dataclasses.replace(run, inputs=broken), tmp_path / "broken", "float32")
    nothing = dataclasses.replace(run.inputs, table=None)
    with pytest.raises(UserError, match="--embeddings TABLE"):
        export_prefixes(dataclasses.replace(run, inputs=nothing), tmp_path / "nothing", "float32")


def test_reading_needs_neither_jax_nor_torch(make_run: Callable, small_shards: None, tmp_path: Path):
    export_prefixes(with_table(make_run(), tmp_path, vectors_of()), tmp_path / "out", "bfloat16")
    code = (
        "import sys\nfrom pathlib import Path\nfrom e2p_jax.export.prefix_reader import PrefixTable\n"
        "print(PrefixTable(Path(sys.argv[1])).lookup(['user-9']).shape)\n"
        "print(sorted({'jax', 'torch', 'transformers', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.splitlines() == ["(1, 1, 32)", "[]"], done.stderr


def test_benchmark_measures(tmp_path: Path):
    script = Path(__file__).parent.parent.parent / "benchmarks" / "prefix_table.py"
    sizes = ["--users", "3000", "--width", "8", "--model-width", "512", "--num-tokens", "4"]  # small shards
    command = [sys.executable, str(script), *sizes, "--workdir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    figures = json.loads(done.stdout or done.stderr)
    assert figures["users"] == 3000 and figures["users_per_s"] > 0 and figures["devices"] == "4 cpu"
    assert not (tmp_path / "work").exists()


def test_malformed_safetensors_are_refused(tmp_path: Path):
    for name, held in {"short": b"\x00", "header": b"\xff" * 16, "json": (2).to_bytes(8, "little") + b"[]"}.items():
        (tmp_path / name).write_bytes(held)
        with pytest.raises(UserError, match=f"{name}: missing or damaged"):
            read_tensors(tmp_path / name, "rerun it")
