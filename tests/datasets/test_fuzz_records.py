"""Every reader of records, on files that are broken at random: a correct record, or an error that says where.

Each starts from a small release in the true format, of which one file is damaged: bytes are replaced, cut off or
repeated, cells become what no cell should be, or all of it is noise.
"""

import importlib
import itertools
import types
from pathlib import Path

import pytest
import releases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.records import Record, check, read_jsonl, read_prompts
from e2p_jax.errors import UserError

READERS = {  # release, configuration -> files
    ("pens", "headlines"): ("news.tsv", "train.tsv", "valid.tsv", "personalized_test.tsv"),
    ("movielens", "leave_last_out"): ("u.data", "u.item"),
    ("own_log", "time"): ("interactions.csv", "items.csv"),
    ("lastfm", "leave_last_out"): ("user_artists.dat", "artists.dat"),
    ("persona_chat", "both_revised"): ("train_both_revised.txt",),
    ("persona_chat", "convai2_json"): ("personachat_self_original.json",),
    ("persona_chat", "convai2_evaluation"): ("data_intermediate.json",),
    ("persona_chat", "synthetic"): ("Synthetic-Persona-Chat_valid.csv",),
}
DATASETS = {"movielens": "interactions", "own_log": "interactions", "lastfm": "interactions"}
CASES = [(*reader, file) for reader, files in READERS.items() for file in files]

NOISE = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(
        [b"\x00", b"\xff", b"\xed\xa0\x80", b'"', b'""', b"\t", b"\r", b"\n", b"\n\n", b"::", b"|", b";;", b",", b" "]
    ),
    st.sampled_from([b"nan", b"inf", b"-1", b"1e400", b"null", b"{}", b"\\ud800", b"1" * 5000, b"x" * 200_000]),
)


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """Up to three damages, one on top of the other."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 1, 5, 40])))
        kind = draw(st.sampled_from(["replace", "replace", "cut", "repeat", "noise"]))
        if kind == "replace":
            content = content[:start] + draw(NOISE) + content[end:]
        elif kind == "cut":
            content = content[:start]
        elif kind == "repeat":
            content = content[:end] + content[start:end] * 2 + content[end:]
        else:
            content = draw(st.binary(max_size=60))
    return content


def assert_correct(record: Record) -> None:
    """Fit to learn from, and every text of it can be written down."""
    assert check(record).user_id
    said = [text for message in record.messages for text in message.values()]
    for text in (record.user_id, *record.context, *said, *record.candidates, *record.references):
        text.encode("utf-8")
    if record.candidates:
        assert record.candidates[0] == record.messages[-1]["content"]


def read_all(release: str, config: str, manual: Path, scratch: Path, bad: BadRecords) -> list[Record]:
    """Every record that the release's builder would write."""
    name = DATASETS.get(release, release)
    builder = importlib.import_module(f"e2p_jax.datasets.{name}.{name}_dataset_builder").Builder(
        config=config or None, data_dir=scratch, bad=bad
    )
    Path(builder.data_dir).mkdir(parents=True, exist_ok=True)
    builder._generate_examples = lambda records: list(records)
    splits = builder._split_generators(types.SimpleNamespace(manual_dir=manual))
    return list(itertools.chain.from_iterable(splits.values()))


@pytest.mark.parametrize(("release", "config", "file"), CASES, ids=[file for *_, file in CASES])
def test_a_damaged_file_gives_correct_records_or_says_where(tmp_path, monkeypatch, release, config, file):
    from e2p_jax.datasets import synthetic

    monkeypatch.setattr(synthetic, "PRETRAINING", range(0))
    manual, scratch = getattr(releases, release)(tmp_path / "manual"), tmp_path / "data"
    whole = (manual / file).read_bytes()
    records = read_all(release, config, manual, scratch, BadRecords())
    assert records and all(assert_correct(record) is None for record in records)

    @given(damages(whole))
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def damaged(content: bytes) -> None:
        (manual / file).write_bytes(content)
        for policy in ("error", "skip"):
            bad = BadRecords(policy, 1.0)
            try:
                for record in read_all(release, config, manual, scratch, bad):
                    assert_correct(record)
            except UserError as error:
                message = str(error)
                assert file in message or message.startswith("interactions: no "), message
                assert "\n" not in message and len(message) < 1500, message

    damaged()


@given(damages(releases.JSONL))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_damaged_json_lines(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(content)
    for read in (lambda: list(read_jsonl(path, "all")), lambda: read_prompts(path)):
        try:
            made = read()
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            for record in made:
                for message in record.messages:
                    message["content"].encode("utf-8")
    kept = list(read_jsonl(path, "all", BadRecords("skip", 1.0)))
    for record in kept:
        assert_correct(Record(record.user_id, record.context, record.messages))
