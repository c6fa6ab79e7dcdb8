"""Every reader of vectors and records, on files with bytes flipped, cut, put in, left out and doubled.

What was written, or a line that names the file. A change passes only where nothing in the format could tell it: in the
text of a CSV file, of ids.txt and of records, and in the numbers of .npy and Arrow files. There it is read as it
stands, says an oracle of its own.
"""

import csv
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from e2p_jax.datasets.prepared import load_table
from e2p_jax.datasets.records import read_jsonl, read_prompts
from e2p_jax.errors import UserError
from e2p_jax.vectors.table import UserTable, save_table

IDS = ["ann", "bob", "zoë 3", "17", "user-5"]
VECTORS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
TURNS = [{"role": role, "content": f"from {role}"} for role in ("user", "assistant", "user")]
RECORDS = [
    {"user_id": "ann", "messages": TURNS},
    {"user_id": 17, "context": ["i ski."], "messages": TURNS},
    {"user_id": "bob", "messages": TURNS, "split": "train"},
]
NOISE = [b"\0", b"\xff", b'"', b",", b"\n", b"\r\n", b"[" * 3000, b"\xef\xbb\xbf", b"nan", b"1e999", b"\\ud800"]
TIMES = 70  # a file


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One or two damages."""
    for _ in range(rng.integers(1, 3)):
        start = int(rng.integers(0, len(content) + 1))
        end = min(start + int(rng.choice([1, 1, 2, 8, 40])), len(content))
        kind = rng.choice(["bit", "bit", "bytes", "cut", "put", "leave out", "double"])
        if kind == "bit" and start < end:
            content = content[:start] + bytes([content[start] ^ 1 << int(rng.integers(8))]) + content[start + 1 :]
        elif kind == "bytes":
            content = content[:start] + rng.bytes(end - start) + content[end:]
        elif kind == "cut":
            content = content[:start]
        elif kind == "put":
            content = content[:start] + NOISE[int(rng.integers(len(NOISE)))] + content[start:]
        elif kind == "leave out":
            content = content[:start] + content[end:]
        elif kind == "double":
            content = content[:end] + content[start:]
    return content


def as_written(table: UserTable, content: bytes) -> bool:
    """For files with a checksum, or of which nothing is data."""
    return list(table.ids) == IDS and np.array_equal(table.lookup(IDS, IDS), VECTORS)


def as_ids_stand(table: UserTable, content: bytes) -> bool:
    lines = content.removesuffix(b"\n").split(b"\n")
    users = list(dict.fromkeys(line.decode() for line in lines))
    rows = [lines.index(user.encode()) for user in users]
    return list(table.ids) == users and np.array_equal(table.lookup(users, users), VECTORS[rows])


def as_numbers_stand(table: UserTable, content: bytes) -> bool:
    return np.array_equal(
        np.asarray(table.vectors), np.frombuffer(content[-VECTORS.nbytes :], "<f4").reshape(5, 3), True
    )


def as_text_stands(table: UserTable, content: bytes) -> bool:
    """As Python's own CSV reader has it: with a header or without, the id first or where the header says."""
    rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")) if row]
    names = [cell.strip().lower() for cell in rows[0]]
    place = next((names.index(name) for name in ("user_id", "user", "id") if name in names), 0)
    found = {user: vector.tolist() for user, vector in zip(table.ids, np.asarray(table.vectors), strict=True)}

    def stands(rows: list[list[str]], place: int) -> bool:
        with np.errstate(over="ignore"):
            return found == {r[place]: [float(np.float32(x)) for n, x in enumerate(r) if n != place] for r in rows}

    return (bool(rows[1:]) and stands(rows[1:], place)) or stands(rows, 0)


def any_numbers(table: UserTable, content: bytes) -> bool:
    """An Arrow file has no checksum: a table of some shape."""
    return table.vectors.shape == (table.index.rows, table.width)


def write_directory(folder: Path) -> Path:
    save_table(folder / "t", IDS, VECTORS, name="n", version="1")
    return folder / "t"


def write_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "t.npz", ids=np.array(IDS), embeddings=VECTORS)
    return folder / "t.npz"


def write_npy(folder: Path) -> Path:
    np.save(folder / "t.npy", VECTORS)
    (folder / "t.ids.txt").write_text("\n".join(IDS) + "\n", encoding="utf-8")
    return folder / "t.npy"


def write_parquet(folder: Path) -> Path:
    table = pa.table({"user_id": IDS, "embedding": list(VECTORS)})
    pq.write_table(table, folder / "t.parquet", write_page_checksum=True, compression="zstd")
    return folder / "t.parquet"


def write_arrow(folder: Path) -> Path:
    pyarrow.feather.write_feather(pa.table({"user_id": IDS, "embedding": list(VECTORS)}), folder / "t.arrow")
    return folder / "t.arrow"


def write_csv(folder: Path) -> Path:
    lines = [["user_id", *range(3)], *([user, *vector] for user, vector in zip(IDS, VECTORS.tolist(), strict=True))]
    (folder / "t.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")
    return folder / "t.csv"


def write_bare_csv(folder: Path) -> Path:
    path = write_csv(folder)
    path.write_text(path.read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8")
    return path


Oracle = Callable[[UserTable, bytes], bool]
TABLES: dict[str, tuple[Callable[[Path], Path], str, Oracle]] = {
    "embeddings.npy": (write_directory, "t/embeddings.npy", as_numbers_stand),
    "ids.txt": (write_directory, "t/ids.txt", as_ids_stand),
    "index.npy": (write_directory, "t/index.npy", as_written),
    "meta.json": (write_directory, "t/meta.json", as_written),
    "npz": (write_npz, "t.npz", as_written),
    "npy": (write_npy, "t.npy", as_numbers_stand),
    "ids beside it": (write_npy, "t.ids.txt", as_ids_stand),
    "parquet": (write_parquet, "t.parquet", as_written),
    "arrow": (write_arrow, "t.arrow", any_numbers),
    "csv": (write_csv, "t.csv", as_text_stands),
    "csv without a header": (write_bare_csv, "t.csv", as_text_stands),
}


@pytest.mark.parametrize("name", TABLES)
def test_damaged_table_is_what_was_written_or_one_line(tmp_path: Path, name: str) -> None:
    write, damaged, stands = TABLES[name]
    place, path = write(tmp_path), tmp_path / damaged
    whole = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    assert stands(load_table(str(place)), whole[path])
    rng, refused = np.random.default_rng(zlib.crc32(name.encode())), 0
    for number in range(TIMES):
        for file, content in whole.items():  # with an index that was not made for what is damaged
            file.write_bytes(content)
        content = mutated(whole[path], rng)
        path.write_bytes(content)
        try:
            table = load_table(str(place))
        except UserError as error:
            refused += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error) and len(str(error)) < 800, str(error)
        else:
            assert stands(table, content), (number, content)
    assert refused < TIMES  # else nothing was compared


def test_damaged_records_are_what_stands_there_or_one_line(tmp_path: Path) -> None:
    path, rng = tmp_path / "r.jsonl", np.random.default_rng(1)
    whole, read = "".join(json.dumps(record) + "\n" for record in RECORDS).encode(), 0
    for _ in range(4 * TIMES):
        content = mutated(whole, rng)
        path.write_bytes(content)
        for reader in (lambda: list(read_jsonl(path, "all")), lambda: read_prompts(path)):
            try:
                records = reader()
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 800, str(error)
                continue
            lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            expected = [json.loads(line, object_pairs_hook=once) for line in lines if line.strip()]
            assert [(r.user_id, list(r.messages)) for r in records] == [
                (str(values["user_id"]), [dict(turn) for turn in values["messages"]]) for values in expected
            ]
            read += 1
    assert read > TIMES / 4


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)
