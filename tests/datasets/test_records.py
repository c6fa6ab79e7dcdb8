"""The record contract: what is read, and how each malformed line is refused."""

import dataclasses
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from e2p_jax.datasets import records
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.records import Record, hold_out
from e2p_jax.errors import UserError

USER = {"role": "user", "content": "any pets?"}
REPLY = {"role": "assistant", "content": "a dog and a cat."}
GOOD = {"user_id": "ann", "messages": [USER, REPLY]}


def read_jsonl(*arguments: Any) -> list[records.Record]:
    return list(records.read_jsonl(*arguments))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_reads_every_key(tmp_path: Path) -> None:
    line = {
        **GOOD,
        "context": ["i have a dog.", "and a cat."],
        "messages": [{"role": "system", "content": "be brief"}, USER, REPLY],
        "candidates": ["a dog and a cat.", "none."],
        "references": ["two."],
    }
    path = write(tmp_path / "r.jsonl", line)
    assert read_jsonl(path, "all") == [
        Record(
            user_id="ann",
            context=("i have a dog.", "and a cat."),
            messages=({"role": "system", "content": "be brief"}, USER, REPLY),
            candidates=("a dog and a cat.", "none."),
            references=("two.",),
            source=f"{path}:1",
        )
    ]


def test_shorthand_is_one_exchange(tmp_path: Path) -> None:
    line = {"user_id": "ann", "prompt": "any pets?", "response": "a dog and a cat.", "context": ["i have a dog."]}
    (record,) = read_jsonl(write(tmp_path / "r.jsonl", line), "all")
    assert record.messages == (USER, REPLY)
    assert record.context == ("i have a dog.",)


def test_splits_and_blank_lines(tmp_path: Path) -> None:
    lines = [
        {**GOOD, "user_id": "a"},
        "",
        {**GOOD, "user_id": "b", "split": "test"},
        "  \t",
        {**GOOD, "split": "train"},
    ]
    path = write(tmp_path / "r.jsonl", *lines)
    train, test = read_jsonl(path, "train"), read_jsonl(path, "test")
    assert [(r.user_id, r.source) for r in train] == [("a", f"{path}:1"), ("ann", f"{path}:5")]
    assert [(r.user_id, r.source) for r in test] == [("b", f"{path}:3")]
    assert read_jsonl(path, "validation") == []
    assert [r.user_id for r in read_jsonl(path, "all")] == ["a", "b", "ann"]


def test_without_splits_one_user_in_twenty_is_held_out(tmp_path: Path) -> None:
    def split_of(users: list[str]) -> tuple[list[str], list[str]]:
        path = write(tmp_path / "r.jsonl", *({**GOOD, "user_id": user} for user in users))
        train, validation = (read_jsonl(path, split) for split in ("train", "validation"))
        return [r.user_id for r in train], [r.user_id for r in validation]

    users = [f"user-{n // 3}" for n in range(300)]
    train, validation = split_of(users)
    assert len(set(validation)) == 5 and sorted(train + validation) == sorted(users)
    assert not set(train) & set(validation)
    again, held_out = split_of(users[::-1])  # the order of the lines does not matter
    assert (again[::-1], held_out[::-1]) == (train, validation)
    train, validation = split_of(["a", "b", "c", "d", "a"])
    assert len(set(validation)) == 2  # another user's vector is needed to compare with
    assert split_of(["a", "b", "a"]) == (["a", "b", "a"], [])


def test_who_is_held_out_is_told_from_hashes_alone() -> None:
    """The users whose digests come first, as ever; the ids themselves are not kept."""
    users = [f"user {n}" for n in range(20_000)]
    tracemalloc.start()
    try:
        is_held_out = hold_out(user for user in [*users, *users])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    ordered = sorted(users, key=lambda user: hashlib.sha256(user.encode()).digest())
    assert [user for user in ordered if is_held_out(user)] == ordered[:1000]
    assert most < 60 * len(users)
    few = hold_out(users[:3])
    assert not any(map(few, users[:3])) and sum(map(hold_out(users[:4]), users[:4])) == 2


def test_lines_end_at_line_feeds_only_and_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    content = "one\u2028two\u0085three"
    line = json.dumps({"user_id": "ann", "prompt": "hi", "response": content}, ensure_ascii=False)
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n" + line.encode() + b"\r\n")
    assert [r.messages[1]["content"] for r in read_jsonl(path, "train")] == [content, content]


def test_parts_calls_and_tools_are_read(tmp_path: Path) -> None:
    """Parts of text are joined; calls are written alike, whether arguments are an object or its JSON."""
    parts = [{"type": "text", "text": "hi, "}, {"type": "text", "text": "there"}]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Oslo"}'}},
        {"name": "look", "arguments": {}},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "", "name": "look", "tool_call_id": "c1"},
        {"role": "assistant", "content": "rain", "reasoning_content": "hm, well", "tool_calls": []},
    ]
    (record,) = read_jsonl(write(tmp_path / "r.jsonl", {**GOOD, "messages": messages, "tools": tools}), "all")
    read = [
        {"type": "function", "function": {"name": "look", "arguments": {"city": "Oslo"}}, "id": "c1"},
        {"type": "function", "function": {"name": "look", "arguments": {}}},
    ]
    assert record.messages == (
        {"role": "user", "content": "hi, there"},
        {"role": "assistant", "content": "", "tool_calls": read},
        messages[2],
        {"role": "assistant", "content": "rain", "reasoning_content": "hm, well"},
    )
    assert record.tools == tuple(tools)
    assert record.reply_words == 8  # look {"city": "Oslo"} look {} rain hm, well
    records.write_jsonl([record], tmp_path / "again.jsonl")
    (again,) = read_jsonl(tmp_path / "again.jsonl", "all")
    assert dataclasses.replace(again, source="") == dataclasses.replace(record, source="")
    (asked,) = records.read_prompts(
        write(tmp_path / "p.jsonl", {"user_id": "ann", "messages": messages[:3], "tools": tools})
    )
    assert asked.messages == record.messages[:3] and asked.tools == record.tools


def test_whole_numbers_become_text_ids(tmp_path: Path) -> None:
    (record,) = read_jsonl(write(tmp_path / "r.jsonl", {**GOOD, "user_id": 17}), "all")
    assert record.user_id == "17"


MALFORMED = {
    "malformed JSON": '{"user_id": "ann", "messages": [}',
    "one object a line": '{"user_id": "ann"} {"user_id": "bob"}',
    "expected a JSON object, got list": [GOOD],
    "unknown keys ['usr']": {**GOOD, "usr": "ann"},
    "missing keys ['user_id']": {"messages": [USER, REPLY]},
    "missing keys ['messages']": {"user_id": "ann"},
    "(or prompt and response)": {"user_id": "ann", "prompt": "hi"},
    "unknown keys ['mesages'], missing keys ['messages']": {"user_id": "ann", "mesages": [USER, REPLY]},
    "unknown keys ['prompt', 'response']": {**GOOD, "prompt": "hi", "response": "hello"},
    "empty dialogue": {**GOOD, "messages": []},
    "no assistant turn": {**GOOD, "messages": [USER]},
    "message 1 (assistant) has no text": {**GOOD, "messages": [USER, {"role": "assistant", "content": " \n"}]},
    "message 0 (user) has no text": {**GOOD, "messages": [{"role": "user"}, REPLY]},
    "message 1 has a part that is no text ('hello')": {"user_id": "ann", "prompt": "hi", "response": ["hello"]},
    "message 0 has a part that is no text ({'type': 'image'": {
        **GOOD,
        "messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, REPLY],
    },
    "message 0 has role 'bot'; use one of system, user, assistant": {
        **GOOD,
        "messages": [{"role": "bot", "content": "hi"}, REPLY],
    },
    "message 0 has role None": {**GOOD, "messages": [{"content": "hi"}, REPLY]},
    "message 1 (assistant) has unknown keys ['name']": {**GOOD, "messages": [USER, {**REPLY, "name": "ann"}]},
    "message 0 (user) has unknown keys ['tool_calls']": {
        **GOOD,
        "messages": [{**USER, "tool_calls": [{"name": "f", "arguments": {}}]}, REPLY],
    },
    "message 1: reasoning_content must be text": {**GOOD, "messages": [USER, {**REPLY, "reasoning_content": 3}]},
    "message 1: tool_calls must be a list": {**GOOD, "messages": [USER, {**REPLY, "tool_calls": "f"}]},
    "message 1: a tool call must be": {
        **GOOD,
        "messages": [USER, {**REPLY, "tool_calls": [{"name": "f", "arguments": "["}]}],
    },
    "tools must be a list of": {**GOOD, "tools": [{"name": "f"}]},
    "messages must be a list of {role, content} objects": {**GOOD, "messages": "hi"},
    "messages must be a list of {role, content}": {**GOOD, "messages": ["hi", "hello"]},
    "context must be a list of texts": {**GOOD, "context": "i have a dog."},
    "candidates must be a list of texts": {**GOOD, "candidates": ["a", 2]},
    "references must be a list of texts": {**GOOD, "references": None},
    "split must be a name, not 3": {**GOOD, "split": 3},
    "split must be a name, not None": {**GOOD, "split": None},
    "user_id must be text or a whole number, not None": {**GOOD, "user_id": None},
    "user_id must be text or a whole number, not 1.5": {**GOOD, "user_id": 1.5},
    "user_id must be text or a whole number, not True": {**GOOD, "user_id": True},
    "user_id must be text or a whole number, not ''": {**GOOD, "user_id": ""},
    "user_id must be text or a whole number, not ['ann']": {**GOOD, "user_id": ["ann"]},
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_line_is_named(tmp_path: Path, message: str) -> None:
    path = write(tmp_path / "r.jsonl", GOOD, "", MALFORMED[message])
    with pytest.raises(UserError) as caught:
        read_jsonl(path, "train")
    text = str(caught.value)
    assert text.startswith(f"{path}:3: ") and message in text
    assert "\n" not in text


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"user_id": "Zo\xeb"}\n')
    with pytest.raises(UserError, match=r"r\.jsonl:2: column 16: not utf-8 \(byte 0xeb\)"):
        read_jsonl(path, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"user_id": "\\ud800", "prompt": "hi", "response": "ho"}', r":2: holds half a surrogate pair"),
        (b"[" * 100_000, r":2: malformed JSON \(nested too deep"),
        (b'{"user_id": ' + b"1" * 5000 + b"}", r":2: malformed JSON \(Exceeds the limit"),
        (b'{"user_id": "' + b"x" * (1 << 24) + b'"}', r":2: 16777231 bytes in one line; a line end is missing"),
    ],
)
def test_what_no_file_should_hold_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=message):
        read_jsonl(path, "train")


def test_bad_lines_are_skipped_and_counted_once(tmp_path: Path) -> None:
    good = [{**GOOD, "user_id": f"u{n}", "split": "train" if n % 2 else "test"} for n in range(18)]
    path = write(tmp_path / "r.jsonl", *good[:7], "{", *good[7:], {"user_id": "x"})
    bad = BadRecords("skip", max_share=0.1)
    for split, users in (("train", range(1, 18, 2)), ("test", range(0, 18, 2))):
        assert [r.user_id for r in read_jsonl(path, split, bad)] == [f"u{n}" for n in users]
    assert bad.report() == f"skipped 2 of 20 records as bad; the first: {bad.first}"
    assert bad.first.startswith(f"{path}:8: malformed JSON")
    with pytest.raises(UserError, match=r"r.jsonl: 2 of 20 records are bad, more than max_bad_share=0.09; .*:8: mal"):
        read_jsonl(path, "train", BadRecords("skip", max_share=0.09))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"max_bad_share is .*; it must be from 0 to 1"):
        BadRecords("skip", share)


def test_written_records_read_back(tmp_path: Path) -> None:
    written = [
        Record("zoë", ("i ❤ tea.",), (USER, REPLY), ("a", "b"), ("c",)),
        Record("bob", (), ({"role": "system", "content": "two\nlines"}, USER, REPLY)),
    ]
    records.write_jsonl(written, tmp_path / "new" / "r.jsonl")
    read = read_jsonl(tmp_path / "new" / "r.jsonl", "all")
    assert [(r.user_id, r.context, r.messages, r.candidates, r.references) for r in read] == [
        (r.user_id, r.context, r.messages, r.candidates, r.references) for r in written
    ]


def test_reply_words_count_assistant_turns_only() -> None:
    assert Record("ann", (), (USER, REPLY, USER, {"role": "assistant", "content": " none \n now"})).reply_words == 7


def test_prompts_end_with_the_users_turn(tmp_path: Path) -> None:
    lines = [
        {"user_id": 3, "prompt": "any pets?"},
        {"user_id": "ann", "prompt": "any pets?", "response": "left out", "split": "test"},
        {"user_id": "bob", "messages": [USER, REPLY, {"role": "user", "content": "names?"}], "context": ["i sing."]},
    ]
    read = records.read_prompts(write(tmp_path / "p.jsonl", *lines))
    assert [(r.user_id, len(r.messages), r.messages[-1]["content"]) for r in read] == [
        ("3", 1, "any pets?"),
        ("ann", 1, "any pets?"),
        ("bob", 3, "names?"),
    ]
    assert read[2].context == ("i sing.",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD, "the last message must be a user turn"),
        ({"user_id": "ann", "prompt": 5}, r"message 0 \(user\) has no text"),
        ({"user_id": "ann"}, r"missing keys \['messages'\]"),
        ({"user_id": "ann", "messages": []}, "empty dialogue"),
        ("[", "malformed JSON"),
    ],
)
def test_malformed_prompt_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"p\.jsonl:2: .*{message}"):
        records.read_prompts(write(tmp_path / "p.jsonl", {"user_id": "a", "prompt": "b"}, line))


def test_missing_prompt_file_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input: .*none\.jsonl does not exist"):
        records.read_prompts(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user_id": "ann", "user_id": "bob", "prompt": "b"}', "the key 'user_id' stands twice"),
        (
            '{"user_id": "a", "messages": [{"role": "user", "content": "a", "content": "b"}]}',
            "key 'content' stands",
        ),
        ("[" * 100_000, "malformed JSON"),
        ('{"user_id": 10.0, "prompt": "b"}', "user_id must be text or a whole number, not 10.0"),
        ('{"user_id": "\\udcff", "prompt": "b"}', "holds half a surrogate pair"),
        ('{"user_id": "a", "prompt": "b", "' + "x" * 9999 + '": 1}', "unknown keys"),
        ('{"user_id": "a", "messages": [{"role": "' + "x" * 9999 + '"}]}', "has role 'xxx"),
    ],
)
def test_hostile_line_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", {"user_id": "a", "prompt": "b"}, line)
    for read in (records.read_prompts, lambda path: read_jsonl(path, "all")):
        with pytest.raises(UserError) as caught:
            read(path)
        said = str(caught.value)
        assert "\n" not in said and len(said) < 700
    with pytest.raises(UserError, match=rf"p\.jsonl:2: .*{message}"):
        records.read_prompts(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "."])
def test_prompt_file_of_an_impossible_name_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^--input: '.*' cannot be opened \(.*\); give another path$"):
        records.read_prompts(Path(name))
