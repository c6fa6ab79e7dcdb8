"""A prefix table whose files were altered: an error of one line that names the file, or the right soft tokens."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.errors import UserError
from e2p_jax.export.prefix_files import save_rows, write_ids, write_manifest
from e2p_jax.export.prefix_reader import PrefixTable
from e2p_jax.vectors.table import UserTable

COUNT, SIZE, WIDTH = 45, 8, 32  # users, users a shard, D
USERS = [f"user-{user}" for user in range(COUNT)]


def rows_of(count: int) -> np.ndarray:
    """[count, 1, D] float16."""
    return np.random.default_rng(7).normal(size=(count, 1, WIDTH)).astype(np.float16)


def write_table(out: Path, count: int, size: int) -> Path:
    """As `e2p prefixes` leaves one, for a reader."""
    out.mkdir()
    table, rows = UserTable([f"user-{user}" for user in range(count)], rows_of(count)[:, 0], "made up"), rows_of(count)
    ids, shards = write_ids(table, out, []), []
    for number, first in enumerate(range(0, count, size)):
        held = rows[first : first + size]
        shards.append({"name": f"{number * 7919 + 1:016x}" * 2, "users": len(held)})
        save_rows(out / f"{shards[-1]['name']}.safetensors", "prefixes", held)
    shape = {"num_tokens": 1, "width": WIDTH, "dtype": "float16", "users": count}
    write_manifest(out, {"format": 2, "backbone": {"fingerprint": "f" * 64}, "ids": ids, "shards": shards, **shape})
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_table(tmp_path / "table", COUNT, SIZE)


def mutate(held: bytes, other: bytes, random: np.random.Generator) -> bytes | None:
    """None: the file is gone."""
    kind, place = int(random.integers(9)), int(random.integers(len(held)))
    stop = place + int(random.integers(1, 65))
    if kind < 3:
        return held[:place] + bytes([held[place] ^ 1 << int(random.integers(8))]) + held[place + 1 :]
    changed = {
        3: held[:place],
        4: held[:place] + bytes(len(held[place:stop])) + held[stop:],
        5: held + random.bytes(int(random.integers(1, 9))),
        6: held[:place] + held[stop:] + held[place:stop],
        7: other,
    }
    return changed.get(kind)


def test_no_altered_file_gives_wrong_soft_tokens(out: Path, tmp_path: Path):
    random, rows, files = np.random.default_rng(0), rows_of(COUNT), sorted(out.iterdir())
    refused = 0
    for _ in range(400):
        shutil.copytree(out, tmp_path / "altered")
        path = tmp_path / "altered" / files[random.integers(len(files))].name
        altered = mutate(path.read_bytes(), files[random.integers(len(files))].read_bytes(), random)
        path.unlink()
        if altered is not None:
            path.write_bytes(altered)
        try:
            assert np.array_equal(PrefixTable(tmp_path / "altered").lookup(USERS), rows)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path / "altered") in str(error) and "rerun" in str(error)
        shutil.rmtree(tmp_path / "altered")
    assert 200 < refused < 400  # an index is made anew; the manifest may be spaced otherwise


def test_a_damaged_row_is_refused_and_the_others_are_served(out: Path):
    table = PrefixTable(out)
    path = out / f"{table.manifest['shards'][1]['name']}.safetensors"
    whole = path.read_bytes()
    for bit in range(0, 8 * 2 * WIDTH, 13):  # of user 10
        row = bytearray(rows_of(COUNT)[10].tobytes())
        place = whole.index(bytes(row))
        row[bit // 8] ^= 1 << bit % 8
        path.unlink()  # else the mapping changes with the file
        path.write_bytes(whole[:place] + bytes(row) + whole[place + len(row) :])
        table = PrefixTable(out)
        with pytest.raises(UserError, match=rf"{path}: damaged: row 2 is not what was written; rerun `e2p prefixes`"):
            table.lookup(["user-3", "user-10"])
        assert np.array_equal(table.lookup(["user-9", "user-11"]), rows_of(COUNT)[[9, 11]])
    path.unlink()
    path.write_bytes(whole)
    assert np.array_equal(table.lookup(["user-10"]), rows_of(COUNT)[[10]])  # the same reader, when it is mended


def test_a_row_of_another_place_or_shard_is_refused(out: Path):
    first, second = (out / f"{shard['name']}.safetensors" for shard in PrefixTable(out).manifest["shards"][:2])
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=f"{first.name}: damaged: row 0"):
        PrefixTable(out).lookup(["user-0"])
    first.write_bytes(held)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][:2] = manifest["shards"][1::-1]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: damaged \(it is not what was written\); rerun `e2p prefixes`"):
        PrefixTable(out)


def test_truncated_and_older_manifests_are_named(out: Path):
    path = out / "manifest.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{path}: damaged"):
            PrefixTable(out)
    for held in (b"[" * 100_000, b"5", b"null", b"\xff\xfe", b"{}"):
        path.write_bytes(held)
        with pytest.raises(UserError, match=f"{path}: damaged"):
            PrefixTable(out)
    older = json.loads(whole)
    del older["checksum"], older["format"]
    path.write_text(json.dumps(older))
    with pytest.raises(
        UserError, match="from an earlier version of e2p_jax, without checksums; run `e2p prefixes` with"
    ):
        PrefixTable(out)


def test_many_shards_need_few_descriptors(tmp_path: Path):
    out = write_table(tmp_path / "many", 200, 1)
    code = (
        "import os, resource, sys\nfrom pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from e2p_jax.export.prefix_reader import PrefixTable\n"
        "table = PrefixTable(Path(sys.argv[1]))\n"
        "for _ in range(2):\n    rows = table.lookup([f'user-{user}' for user in range(200)])\n"
        "sys.stdout.buffer.write(rows.tobytes())\nprint(len(os.listdir('/proc/self/fd')), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, env=os.environ)
    assert done.stdout == rows_of(200).tobytes(), done.stderr
    assert int(done.stderr) < 32
