"""Versions of a prefix table: whole whenever one looks, held by their readers, put back when asked for."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.cli import main
from e2p_jax.errors import UserError
from e2p_jax.export.prefix_files import read_manifest, save_rows, swap, write_ids
from e2p_jax.export.prefix_reader import PrefixTable
from e2p_jax.vectors.table import UserTable

USERS = [f"user-{user}" for user in range(20)]


def land(out: Path, version: int, keep_hours: float = 24) -> None:
    """An update, as `e2p prefixes` writes one: five shards of four users, every number of them the version's."""
    out.mkdir(exist_ok=True)
    before = read_manifest(out / "manifest.json") if (out / "manifest.json").exists() else None
    shards = [{"name": f"{version * 100 + number + 1:032x}", "users": 4} for number in range(5)]
    for shard in shards:
        save_rows(out / f"{shard['name']}.safetensors", "prefixes", np.full((4, 1, 8), version, np.float32))
    ids = write_ids(UserTable(USERS, np.zeros((20, 2), np.float32), "made up"), out, [])
    for kind in ("tokens.safetensors", "tokenizer"):
        (out / f"{0:032x}.{kind}").touch()
    names = {"ids": ids, "shards": shards, "tokens": f"{0:032x}", "tokenizer": f"{0:032x}"}
    shape = {"num_tokens": 1, "width": 8, "dtype": "float32"}
    swap(out, before, {"format": 2, "backbone": {"fingerprint": "f"}, **names, **shape}, keep_hours)


def seen(out: Path) -> int:
    """The version that a reader finds, which is whole."""
    rows = PrefixTable(out).lookup(USERS)
    assert (rows == rows[0, 0, 0]).all()
    return int(rows[0, 0, 0])


def test_a_version_is_put_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "table"
    names = []
    for version in range(3):
        land(out, version)
        names.append(PrefixTable(out).version)
    reader = PrefixTable(out)
    assert main(["rollback", str(out)]) == 0 and capsys.readouterr().out == f"{names[1]}\n"
    assert seen(out) == 1 and reader.lookup(["user-7"])[0, 0, 0] == 2
    assert reader.reload().version == names[1] and reader.reload().reload().version == names[1]
    for version, now in [([], 2), (["--version", names[0]], 0), ([], 2)]:
        assert main(["rollback", str(out), *version]) == 0 and seen(out) == now
    capsys.readouterr()
    assert main(["rollback", str(out), "--version", "f" * 16]) == 1
    error = f"e2p: {out}: no earlier version {'f' * 16}; kept: {names[0]}, {names[1]}\n"
    assert capsys.readouterr().err == error
    (out / f"{1:032x}.safetensors").unlink()
    assert main(["rollback", str(out), "--version", names[0]]) == 1
    assert f"of version {names[0]} {1:032x}.safetensors is gone" in capsys.readouterr().err
    del reader
    land(out, 3, keep_hours=0)
    assert main(["rollback", str(out)]) == 1 and "kept: none: there was no update, or" in capsys.readouterr().err
    assert seen(out) == 3 and len(list(out.glob("*.safetensors"))) == 5 + 1


def test_what_a_reader_holds_is_not_removed(tmp_path: Path):
    out = tmp_path / "table"
    land(out, 0)
    reader = PrefixTable(out)
    for version in (1, 2):
        land(out, version, keep_hours=0)
    reader._shard.cache_clear()  # as if more shards were there than descriptors
    assert (reader.lookup(USERS) == 0).all() and len(list(out.glob("*.safetensors"))) == 2 * 5 + 1
    newer = reader.reload()
    assert newer.version == PrefixTable(out).version and newer.reload() is newer
    del reader
    land(out, 2, keep_hours=0)
    assert len(list(out.glob("*.safetensors"))) == 5 + 1 and (newer.lookup(USERS) == 2).all()
    land(out, 0)  # a version that was there before comes again
    assert seen(out) == 0 and main(["rollback", str(out)]) == 0 and seen(out) == 2


def test_storage_without_locks_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    land(tmp_path / "table", 0)
    reader = PrefixTable(tmp_path / "table")
    land(tmp_path / "table", 1, keep_hours=0)
    assert len(list((tmp_path / "table").glob("*.safetensors"))) == 5 + 1 and (reader.lookup(USERS) == 0).all()


def test_a_reader_serves_on_where_the_new_version_is_damaged(tmp_path: Path):
    out = tmp_path / "table"
    land(out, 0)
    reader = PrefixTable(out)
    land(out, 1)
    shard = out / f"{101:032x}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name}: missing or damaged"):
        reader.reload()
    assert (reader.lookup(USERS) == 0).all()
    assert main(["rollback", str(out)]) == 0 and reader.reload().version == reader.version


WRITER = """
import os, sys
from pathlib import Path
import test_prefix_versions as versions
out = Path(sys.argv[1])
for round in range(8):
    print("ready", flush=True)
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        for version in range(10_000 * round + 1, 10_000 * round + 9_999):
            versions.land(out, version, keep_hours=0)
        os._exit(0)
    os.wait()
    print("dead", flush=True)
    sys.stdin.readline()
"""


def test_a_killed_update_leaves_a_whole_table(tmp_path: Path):
    """Of eight processes that write version after version, each dies in the midst of one; a reader follows all."""
    out, random = tmp_path / "table", np.random.default_rng(0)
    land(out, 0)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", WRITER, str(out)]
    table, found = PrefixTable(out), []
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment) as writer:
        assert writer.stdin and writer.stdout and writer.stderr
        while writer.stdout.readline() == "ready\n":
            pid, before, new = int(writer.stdout.readline()), seen(out), set[int]()
            while len(new) < random.integers(1, 4):
                table = table.reload()
                rows = table.lookup(USERS)
                assert (rows == rows[0, 0, 0]).all()
                found.append(int(rows[0, 0, 0]))
                new |= {found[-1]} - {before}
            time.sleep(random.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            assert writer.stdout.readline() == "dead\n"
            found.append(seen(out))
            writer.stdin.write("\n")
            writer.stdin.flush()
        assert writer.wait() == 0, writer.stderr.read()
    assert found == sorted(found) and len(set(found)) > 8
    del table
    land(out, 90_000, keep_hours=0)
    assert len(list(out.glob("*.safetensors"))) == 5 + 1 and not list(out.glob(".*"))
