"""Tokenised data on disk: the same as tokenised now, keyed by all that it depends on, and never trusted if damaged."""

import dataclasses
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2p_jax.config import Config, DataConfig
from e2p_jax.data import training
from e2p_jax.data.conditions import spelled_out, vectors_of
from e2p_jax.data.encode import Encoder, Example
from e2p_jax.data.examples import Examples
from e2p_jax.data.packing import choose_budget, plan_rows
from e2p_jax.data.training import Training, read_training
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.prepared import load_training
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.errors import UserError
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import UserTable


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Twelve users, of whom two are `dev`."""
    write_jsonl([synthetic.record(user) for user in range(12)], tmp_path / "records.jsonl")
    data = DataConfig(path=str(tmp_path / "records.jsonl"), cache=str(tmp_path / "cache"), seq_len=256)
    return Config(data=dataclasses.replace(data, eval_splits=("validation",)))


def read(config: Config, tokenizer: Any) -> Training:
    return read_training(config, Encoder.from_config(config, tokenizer))


def assert_same(ours: Training, theirs: Training) -> None:
    for name in ("tokens", "is_target", "ends", "slot_starts", "slot_ends", "target_counts"):
        a, b = getattr(ours.examples, name), getattr(theirs.examples, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    for name in ("users", "sources"):
        assert list(getattr(ours.examples, name)) == list(getattr(theirs.examples, name)), name
    assert list(map(list, ours.rows)) == list(map(list, theirs.rows))
    for field in ("budget", "dev", "reported", "dropped_messages", "skipped"):
        assert getattr(ours, field) == getattr(theirs, field), field


def peak_of(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What it gives; bytes that are held after, and at most, beyond what was held before."""
    tracemalloc.start()
    try:
        result = work()
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, held, most


def forbid(*_: Any) -> None:
    raise AssertionError("tokenised again")


def test_columns_give_back_the_examples() -> None:
    rng = np.random.default_rng(0)
    given = [
        Example(
            *(rng.integers(0, 99, n), rng.random(n) < 0.5, tuple(range(n % 3)), f"us\xe9r {n}", "f:1" * n),
            items=np.arange(n % 4, dtype=np.int32),
        )
        for n in rng.integers(1, 30, 20).tolist()
    ]
    examples = Examples.of(iter(given))
    assert len(examples) == 20
    for ours, theirs in zip([*examples, examples[-1], *examples[3:5]], [*given, given[-1], *given[3:5]], strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.is_target, theirs.is_target)
        assert ours[2:5] == theirs[2:5]
        np.testing.assert_array_equal(ours.items, theirs.items)
    assert examples.item_counts.tolist() == [len(e.items) for e in given]
    assert examples.lengths.tolist() == [len(e.tokens) for e in given]
    assert examples.target_counts.tolist() == [int(e.is_target.sum()) for e in given]
    with pytest.raises(IndexError):
        examples[20]


def test_millions_of_conversations_are_numbers_on_disk(tmp_path: Path) -> None:
    """Ready: 8 bytes of each, the row of its vector. On the way: a few numbers of each, and none of its tokens."""
    count, rng = 6_000, np.random.default_rng(0)
    kinds = [(np.arange(n, dtype=np.int32), np.arange(n) % 3 == 1) for n in rng.integers(20, 200, 50)]
    given = (Example(*kinds[n % 50], (0,), f"user {n}", f"/a/file.jsonl:{n}") for n in range(count))
    table = UserTable([f"user {n}" for n in range(count)], np.ones((count, 1), np.float16), "table")

    def start() -> tuple[Any, ...]:
        examples = Examples.of(given, tmp_path)
        rows = plan_rows(examples, choose_budget(examples, 512))
        users, where = examples.users, examples.sources
        vectors = vectors_of(users, where, "e2p", table, Population.standard(1))
        return examples, vectors, len(rows)

    start_small = Examples.of(iter([Example(*kinds[0], (0,), "", "")] * 40), tmp_path)  # imports, and NumPy's own
    plan_rows(start_small, choose_budget(start_small, 512))
    (examples, vectors, _), held, most = peak_of(start)
    assert held < 20 * count and most < 350 * count, (held / count, most / count)
    assert not list(tmp_path.iterdir()) and not examples.tokens.flags.writeable
    assert vectors.rows.tolist() == list(range(count)) and examples.sources[-1] == f"/a/file.jsonl:{count - 1}"


def test_second_start_reads_the_cache(
    config: Config, make_tokenizer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    first = read(config, tokenizer)
    uncached = read(dataclasses.replace(config, data=dataclasses.replace(config.data, cache="none")), tokenizer)
    assert_same(first, uncached)
    monkeypatch.setattr(training, "_read", forbid)
    again = read(config, tokenizer)
    assert_same(again, first)
    for array in (again.examples.tokens, again.examples.user_text, again.rows.values):
        assert not array.flags.writeable  # it is mapped
    assert len(first.dev) == 2 and all(record.messages for record in first.dev)
    assert [path.name[0] for path in Path(config.data.cache).iterdir() if path.name.startswith(".")] == []
    # What has no say in the tokens shares them.
    data = dataclasses.replace(config.data, embeddings="synthetic", missing_user="null")
    assert_same(read(dataclasses.replace(config, data=data), tokenizer), first)


@pytest.mark.parametrize("dev", ["auto", "selection"])
def test_training_records_are_read_one_by_one(tmp_path: Path, dev: str) -> None:
    """Whatever says which split a line is of, and whoever picks the checkpoint."""
    lines = [{"user_id": f"u{n}", "prompt": "hi", "response": f"{n} " * 20_000} for n in range(300)]
    if dev != "auto":
        lines = [line | {"split": "selection" if n < 3 else "train"} for n, line in enumerate(lines)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = DataConfig(path=str(tmp_path / "r.jsonl"), dev_split=dev)
    learned, held = load_training(data, {})
    users, _, peak = peak_of(lambda: [record.user_id for record in learned])
    assert sum(len(json.dumps(line)) for line in lines) > 20e6 and peak < 5e6
    others = [record.user_id for record in held]
    left = 300 - len(others) if dev != "auto" else 300 - 15 - len(others)  # 15 are of `validation`
    assert len(others) >= 3 and len(users) == left and not set(users) & set(others)


def test_another_users_text_is_learned_from(config: Config, make_tokenizer: Callable) -> None:
    config = config.change(data={"condition": "text+shuffled"})
    tokenizer = make_tokenizer()
    found, cached = read(config, tokenizer), read(config, tokenizer)
    assert_same(cached, found)
    records = list(load_training(config.data, found.reported)[0])
    encoder = Encoder.from_config(config, tokenizer)
    for example, record in zip(found.examples, spelled_out(records, "text+shuffled"), strict=True):
        assert record.context != next(r.context for r in records if r.user_id == record.user_id)
        np.testing.assert_array_equal(example.tokens, encoder.fit(record, ["text"]).examples["text"].tokens)


CHANGES: dict[str, dict[str, Any]] = {
    "seq_len": {"data": {"seq_len": 128}},
    "condition": {"data": {"condition": "text"}},
    "another's text": {"data": {"condition": "text+shuffled"}},
    "targets": {"data": {"targets": "all"}},
    "too_long": {"data": {"too_long": "refuse"}},
    "context_prompt": {"data": {"context_prompt": "I am: {context}"}},
    "splits": {"data": {"eval_splits": ("train",)}},
    "dev_split": {"data": {"dev_split": "train"}},
    "bad": {"data": {"on_bad_record": "skip"}},
    "placement": {"prefix": {"placement": "in_chat"}},
    "num_tokens": {"projector": {"num_tokens": 3}},
}


@pytest.mark.parametrize("change", [*CHANGES, "template", "tokenizer", "special tokens", "one letter", "order"])
def test_everything_that_has_a_say_has_tokens_of_its_own(
    config: Config, make_tokenizer: Callable, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Encoder.from_config(config, make_tokenizer())
    key = training._key(config, before)
    tokenizer, path = make_tokenizer(), Path(config.data.path)
    changed = config
    for section, fields in CHANGES.get(change, {}).items():
        changed = dataclasses.replace(changed, **{section: dataclasses.replace(getattr(changed, section), **fields)})
    if change == "template":
        text = before.template + " "
        (tmp_path / "own.jinja").write_text(text)
        changed = dataclasses.replace(
            config, data=dataclasses.replace(config.data, chat_template=str(tmp_path / "own.jinja"))
        )
    elif change == "tokenizer":
        tokenizer.add_tokens(["zebra"])
    elif change == "special tokens":
        tokenizer = make_tokenizer(eos_token="<|im_end|>")
    elif change == "one letter":
        path.write_text(path.read_text().replace("hi", "ha", 1))
    elif change == "order":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))
    assert training._key(changed, Encoder.from_config(changed, tokenizer)) != key
    assert training._key(config, before) == key or change in ("one letter", "order")


def test_directories_are_told_apart_by_content_and_names(tmp_path: Path) -> None:
    prints = set()
    for name, content in (("a", "1"), ("a", "2"), ("b", "2")):
        place = tmp_path / f"{name}{content}"
        place.mkdir()
        (place / name).write_text(content)
        prints.add(training.fingerprint(DataConfig(path=str(place))))
    assert len(prints) == 3


@pytest.mark.parametrize(
    "name",
    [
        "tokens.npy",
        "is_target.npy",
        "ends.npy",
        "user_text.npy",
        "source_ends.npy",
        "rows.npy",
        "records.json",
        "meta.json",
    ],
)
@pytest.mark.parametrize("fault", ["cut", "flip", "gone"])
def test_damaged_cache_is_made_anew(config: Config, make_tokenizer: Callable, name: str, fault: str) -> None:
    tokenizer = make_tokenizer()
    first = read(config, tokenizer)
    (place,) = Path(config.data.cache).iterdir()
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    content = bytearray(whole[name])
    if fault == "gone":
        (place / name).unlink()
    else:
        content[-9] ^= 1
        (place / name).write_bytes(content[:-5] if fault == "cut" else content)
    assert_same(read(config, tokenizer), first)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == whole


def test_another_layout_is_made_anew_and_said(
    config: Config, make_tokenizer: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    first = read(config, tokenizer)
    (place,) = Path(config.data.cache).iterdir()
    meta = json.loads((place / "meta.json").read_text())
    (place / "meta.json").write_text(json.dumps({"files": meta["files"]}))  # as the second layout had it
    assert capsys.readouterr().err == ""
    assert_same(read(config, tokenizer), first)
    assert capsys.readouterr().err == f"data.cache: {place} is made anew (it has the layout of another version)\n"
    assert json.loads((place / "meta.json").read_text()) == meta


@pytest.mark.parametrize(
    "content", ['{"files": {}}', "{}", "[]", "5", '{"files": []}', "[" * 100_000, '{"files": null}']
)
def test_a_manifest_that_vouches_for_nothing_is_not_believed(
    config: Config, make_tokenizer: Callable, content: str
) -> None:
    tokenizer = make_tokenizer()
    first = read(config, tokenizer)
    (place,) = Path(config.data.cache).iterdir()
    np.save(place / "tokens.npy", np.load(place / "tokens.npy") + 1)
    (place / "meta.json").write_text(content)
    assert_same(read(config, tokenizer), first)


def test_data_changed_with_size_and_time_kept_is_read_again(config: Config, make_tokenizer: Callable) -> None:
    tokenizer, path = make_tokenizer(), Path(config.data.path)
    first, before = read(config, tokenizer), path.stat()
    with path.open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content.replace(b"?", b"!"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    changed = read(config, tokenizer)
    assert first.examples.tokens.tolist() != changed.examples.tokens.tolist()
    assert_same(
        read(dataclasses.replace(config, data=dataclasses.replace(config.data, cache="none")), tokenizer), changed
    )


def test_data_written_while_it_is_read_is_not_kept(
    config: Config, make_tokenizer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tokens of the new content would stand under the name of the old, and come back with it."""
    tokenizer, path = make_tokenizer(), Path(config.data.path)
    old, reading = path.read_text(), training._read

    def interrupted(*arguments: Any) -> Training:
        path.write_text(old.replace("?", "!"))
        return reading(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_read", interrupted)
        other = read(config, tokenizer)
    path.write_text(old)
    assert read(config, tokenizer).examples.tokens.tolist() != other.examples.tokens.tolist()


def test_cache_that_cannot_be_written_is_named(config: Config, make_tokenizer: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = dataclasses.replace(config.data, cache=str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"data\.cache: .*file cannot be written \(.+\); name another directory, or none"
    ):
        read(dataclasses.replace(config, data=data), make_tokenizer())


def test_what_was_skipped_is_told_again(config: Config, make_tokenizer: Callable) -> None:
    path = Path(config.data.path)
    path.write_text(path.read_text() + json.dumps({"user_id": "x", "messages": []}) + "\n")
    data = dataclasses.replace(config.data, on_bad_record="skip", max_bad_share=0.5)
    config = dataclasses.replace(config, data=data)
    told = [read(config, make_tokenizer()).skipped for _ in range(2)]
    assert told[0] == told[1] and told[0] is not None and told[0].startswith("skipped 1 of 13 records")
