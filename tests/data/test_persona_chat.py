"""Persona-Chat: ParlAI's text form, splits, users and their vectors."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p_jax.data.embeddings import load_table
from e2p_jax.data.persona_chat.parlai import read_dialogues
from e2p_jax.data.prepare import prepare
from e2p_jax.data.prepared import load_records
from e2p_jax.data.records import Record
from e2p_jax.errors import UserError

DOGS, CATS, BIRDS = ["i have a dog.", "i run."], ["i have a cat."], ["i keep birds.", "café owner."]


def parlai(dialogues, end="\n") -> str:
    """[(persona, turns)] -> text, written the way the format is described; a turn is (partner, reply[, candidates])."""
    text = ""
    for persona, turns in dialogues:
        lines = [f"your persona: {sentence}" for sentence in persona]
        lines += [f"{p}\t{r}" + "".join(f"\t\t{'|'.join(c)}" for c in rest) for p, r, *rest in turns]
        text += "".join(f"{number} {line}{end}" for number, line in enumerate(lines, 1))
    return text


def turns(name: str) -> list[tuple[str, str]]:
    return [("hello", f"hi {name}"), (f"ask {name}", f"reply {name}")]


WITH_CANDIDATES = [("hello", "hi v", ["x", "hi v"]), ("ask v", "reply v", ["wrong one", "wrong two", "reply v"])]
TRAIN = [(DOGS, turns("a")), (CATS, turns("b")), (DOGS[::-1], turns("c")), (BIRDS, turns("d")), (BIRDS, turns("e")),
         (DOGS, turns("f"))]  # fmt: skip
VALID = [(["i swim."], WITH_CANDIDATES), (["i ski."], turns("w"))]


@pytest.fixture
def manual(tmp_path: Path) -> Path:
    """Original files; the validation file as a Windows editor saves it: a byte order mark and CRLF."""
    directory = tmp_path / "manual"
    directory.mkdir()
    (directory / "train_self_original.txt").write_bytes(parlai(TRAIN).encode())
    (directory / "valid_self_original.txt").write_bytes(parlai(VALID, "\r\n").encode("utf-8-sig"))
    return directory


def last_replies(records: list[Record]) -> list[str]:
    return [record.messages[-1]["content"] for record in records]


def test_splits_hold_out_the_last_dialogue_of_users_with_several(manual, tmp_path):
    directory = prepare("persona_chat", manual, tmp_path / "data")
    train, seen, unseen = (load_records(str(directory), s) for s in ("train", "validation_seen", "validation"))
    assert last_replies(train) == ["reply a", "reply b", "reply c", "reply d"]
    assert last_replies(seen) == ["reply e", "reply f"]
    assert last_replies(unseen) == ["reply v", "reply w"]
    assert train[0].user_id == train[2].user_id == seen[1].user_id  # the same sentences in another order
    assert len({record.user_id for record in [*train, *unseen]}) == 5


def test_record_has_persona_turns_and_candidates_true_one_first(manual, tmp_path):
    directory = prepare("persona_chat", manual, tmp_path / "data")
    swimmer, skier = load_records(str(directory), "validation")
    assert swimmer.context == ("i swim.",)
    assert swimmer.messages == (
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi v"},
        {"role": "user", "content": "ask v"},
        {"role": "assistant", "content": "reply v"},
    )
    assert swimmer.candidates == ("reply v", "wrong one", "wrong two")
    assert skier.candidates == swimmer.references == ()
    assert load_records(str(directory), "train")[3].context == tuple(BIRDS)  # not ASCII


def test_no_user_with_two_dialogues_means_no_seen_split(manual, tmp_path):
    (manual / "train_self_original.txt").write_text(parlai(TRAIN[:2]))
    directory = prepare("persona_chat", manual, tmp_path / "data")
    with pytest.raises(UserError, match=r"no split 'validation_seen'; there are train, validation$"):
        load_records(str(directory), "validation_seen")


def test_the_partners_persona_is_not_the_users(tmp_path):
    path = tmp_path / "both.txt"
    path.write_text("1 your persona: i run.\n2 partner's persona: i sleep.\n3 hi\thello\n")
    (record,) = read_dialogues(path)
    assert record.context == ("i run.",) and len(record.messages) == 2


_text = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n|"), min_size=1).filter(lambda t: t == t.strip())
_turn = st.tuples(_text.filter(lambda t: "persona:" not in t), _text)
_dialogue = st.tuples(st.lists(_text, min_size=1, max_size=3), st.lists(_turn, min_size=1, max_size=3))


@given(st.lists(_dialogue, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(tmp_path_factory, dialogues):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(parlai(dialogues).encode())
    read = []
    for record in read_dialogues(path):
        said = [message["content"] for message in record.messages]
        read.append((list(record.context), list(zip(said[::2], said[1::2], strict=True))))
    assert read == dialogues


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"2 your persona: a\n", r":1: starts with '2', expected the line number 1"),
        (b"1 your persona: a\n3 hi\tho\n", r":2: starts with '3', expected the line number 1 .* or 2"),
        (b"1 your persona: a\n\n2 hi\tho\n", r":2: starts with ''"),
        (b"1 your persona: a\n2 hi\tho\n3 your persona: b\n", r":3: a persona line"),
        (b"1 your persona: \n2 hi\tho\n", r":1: a persona line must have a sentence"),
        (b"1 hi\tho\n", r":1: this dialogue lacks `your persona:` lines"),
        (b"1 your persona: a\n1 your persona: b\n2 hi\tho\n", r":1: this dialogue lacks turns"),
        (b"1 your persona: a\n2 hi\n", r":2: expected PARTNER<TAB>REPLY, .* has 1 tab"),
        (b"1 your persona: a\n2 hi\tho\t\n", r":2: .* has 3 tab"),
        (b"1 your persona: a\n2 hi\tho\tx\tho|b\n", r":2: expected PARTNER"),
        (b"1 your persona: a\n2 hi\t \n", r":2: expected PARTNER"),
        (b"1 your persona: a\n2 hi\tho\t\tb|c\n", r":2: the reply is not among its candidates"),
        (b"1 your persona: caf\xe9\n2 hi\tho\n", r":1: not UTF-8 \(byte 19 "),
        (b"", r"bad.txt: empty"),
    ],
)
def test_a_line_that_breaks_the_format_is_named(tmp_path, text, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_dialogues(path)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_missing_file_is_named(manual, tmp_path, part):
    (manual / f"{part}_self_original.txt").unlink()
    with pytest.raises(UserError, match=rf"{part}_self_original.txt: not found; .*ConvAI2.*ParlAI"):
        prepare("persona_chat", manual, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_revised_personas_are_another_config_with_its_own_table(manual, tmp_path):
    for part, dialogues in (("train", TRAIN), ("valid", VALID)):
        np.save(manual / f"{part}_embeddings.npy", np.ones((len(dialogues), 2), np.float16))
        revised = [([f"so {s}" for s in persona], lines) for persona, lines in dialogues]
        (manual / f"{part}_self_revised.txt").write_text(parlai(revised))
    for config, table, sentence in [("", "", "i have a dog."), ("/self_revised", "_self_revised", "so i have a dog.")]:
        directory = prepare(f"persona_chat{config}", manual, tmp_path / "data")
        record = load_records(str(directory), "train")[0]
        assert record.context[0] == sentence
        load_table(str(tmp_path / "data" / "persona_chat" / f"embeddings{table}")).lookup([record.user_id], [""])


def test_a_users_vector_is_the_mean_of_its_dialogues(manual, tmp_path):
    rows = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    np.save(manual / "train_embeddings.npy", rows)
    np.save(manual / "valid_embeddings.npy", rows[:2] + 1)
    directory = prepare("persona_chat", manual, tmp_path / "data")
    train, unseen = load_records(str(directory), "train"), load_records(str(directory), "validation")
    table = load_table(str(tmp_path / "data" / "persona_chat" / "embeddings"))
    users = [record.user_id for record in [*train[:2], train[3], *unseen]]
    means = [rows[[0, 2, 5]].mean(0), rows[1], rows[[3, 4]].mean(0), rows[0] + 1, rows[1] + 1]
    np.testing.assert_allclose(table.lookup(users, users), means, rtol=1e-6)
    assert len(table) == 5


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        (np.ones((5, 3)), np.ones((2, 3)), r"train_embeddings.npy: 5 rows for 6 dialogues"),
        (np.ones((6, 3)), np.ones((3, 3)), r"valid_embeddings.npy: 3 rows for 2 dialogues"),
        (np.ones((6, 3)), np.ones((2, 4)), r"different widths, 3 and 4"),
        (np.ones((6, 3)), np.array([[0, 0, 0], [0, np.nan, 0]]), r"valid_embeddings.npy: row 1 \(.*:4\) holds NaN"),
        (np.ones(6), np.ones((2, 3)), r"train_embeddings.npy: float64 of shape \(6,\)"),
        (np.ones((6, 3), int), np.ones((2, 3)), r"train_embeddings.npy: int64 of shape"),
        (np.array([[object()] * 3] * 6), np.ones((2, 3)), r"train_embeddings.npy: not a NumPy array of numbers"),
        (None, np.ones((2, 3)), r"valid_embeddings.npy: needs train_embeddings.npy and valid"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(manual, tmp_path, train, valid, message):
    for part, vectors in (("train", train), ("valid", valid)):
        if vectors is not None:
            np.save(manual / f"{part}_embeddings.npy", vectors)
    with pytest.raises(UserError, match=message):
        prepare("persona_chat", manual, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("dataset_info.json"))


def test_the_real_release(shared, tmp_path):
    """Counts of its README; texts against the files, line by line; vectors against their rows."""
    original = shared / "data" / "persona_chat"
    directory = prepare("persona_chat", original, tmp_path)
    records = {split: load_records(str(directory), split) for split in ("train", "validation_seen", "validation")}
    train, unseen = records["train"] + records["validation_seen"], records["validation"]
    users, strangers = {r.user_id for r in train}, {r.user_id for r in unseen}
    assert (len(train), len(unseen), len(users), len(strangers)) == (1072, 600, 931, 455)
    assert not users & strangers
    assert users == {r.user_id for r in records["train"]}

    def text(record: Record) -> str:
        said = [message["content"] for message in record.messages]
        return parlai([(record.context, zip(said[::2], said[1::2], strict=True))])

    lines = (original / "train_self_original.txt").read_text().splitlines(keepends=True)
    starts = [row for row, line in enumerate(lines) if line.startswith("1 ")]
    dialogues = ["".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    by_text = {text(record): record.user_id for record in train}
    assert by_text.keys() == set(dialogues)
    assert "".join(map(text, unseen)) == (original / "valid_self_original.txt").read_text()

    table = load_table(str(tmp_path / "persona_chat" / "embeddings"))
    for part, names in (("train", [by_text[d] for d in dialogues]), ("valid", [r.user_id for r in unseen])):
        rows = np.load(original / f"{part}_embeddings.npy")
        np.testing.assert_allclose(table.lookup(names, names), rows, atol=1e-6)
