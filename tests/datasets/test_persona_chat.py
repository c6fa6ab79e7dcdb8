"""Persona-Chat: ParlAI's text form, splits, users and their vectors."""

import csv
import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.persona_chat.dialogues import Dialogue, user_id
from e2p_jax.datasets.persona_chat.release import COLUMNS, read_both, read_dialogues
from e2p_jax.datasets.prepare import prepare
from e2p_jax.datasets.prepared import load_records, load_table
from e2p_jax.datasets.records import Record
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
    with pytest.raises(
        UserError, match=r"no split 'validation_seen'; there are train, validation, validation_ranking$"
    ):
        load_records(str(directory), "validation_seen")


def test_the_partners_persona_is_not_the_users(tmp_path):
    path = tmp_path / "both.txt"
    path.write_text("1 your persona: i run.\n2 partner's persona: i sleep.\n3 hi\thello\n")
    (dialogue,) = read_dialogues(path, BadRecords())
    record = dialogue.record("self")
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
    for dialogue in read_dialogues(path, BadRecords()):
        read.append((list(dialogue.persona), [(turn.partner, turn.reply) for turn in dialogue.turns]))
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
        (b"1 your persona: caf\xe9\n2 hi\tho\n", r":1: column 20: not utf-8 \(byte 0xe9\)"),
        (b"", r"bad.txt: empty"),
    ],
)
def test_a_line_that_breaks_the_format_is_named(tmp_path, text, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_dialogues(path, BadRecords())


def test_a_part_is_prepared_alone_and_missing_files_are_named(manual, tmp_path):
    (manual / "train_self_original.txt").unlink()
    directory = str(prepare("persona_chat", manual, tmp_path / "data"))
    assert last_replies(load_records(directory, "validation")) == ["reply v", "reply w"]
    (manual / "valid_self_original.txt").unlink()
    with pytest.raises(UserError, match=r"holds none of train_self_original.txt, valid_.*ConvAI2.*ParlAI"):
        prepare("persona_chat", manual, tmp_path / "none")
    assert not (tmp_path / "none").exists()


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
        (np.array([[object()] * 3] * 6), np.ones((2, 3)), r"train_embeddings.npy: unreadable"),
        (None, np.ones((2, 3)), r"valid_embeddings.npy: needs train_embeddings.npy beside it"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(manual, tmp_path, train, valid, message):
    for part, vectors in (("train", train), ("valid", valid)):
        if vectors is not None:
            np.save(manual / f"{part}_embeddings.npy", vectors)
    with pytest.raises(UserError, match=message):
        prepare("persona_chat", manual, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("dataset_info.json"))


def test_other_and_both_tell_of_the_partner(tmp_path):
    both = "1 your persona: i run.\n2 partner's persona: i sleep.\n3 hi\tho\t\tx|ho\n4 and\tso\t\tso|y\n"
    other = "1 partner's persona: i sleep.\n2 hi\tho\n3 and\tso\n"
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}_both_revised.txt").write_text(both)
        (tmp_path / f"{part}_other_revised.txt").write_text(other)
    read = {}
    for config in ("both_revised", "other_revised", "both_revised_no_cands"):
        directory = str(prepare(f"persona_chat/{config}", tmp_path, tmp_path / "data"))
        (read[config],) = load_records(directory, "test")
    assert read["both_revised"].context == ("my persona: i run.", "partner's persona: i sleep.")
    assert read["other_revised"].context == ("i sleep.",)
    assert read["both_revised"].candidates == ("so", "y") and read["both_revised_no_cands"].candidates == ()
    assert read["both_revised"].user_id == read["both_revised_no_cands"].user_id != read["other_revised"].user_id
    assert read["both_revised"].messages == read["other_revised"].messages
    (tmp_path / "train_both_revised.txt").write_text("1 your persona: i run.\n2 hi\tho\n")
    with pytest.raises(UserError, match=r"train_both_revised.txt:1: this dialogue lacks `partner's persona:` lines"):
        prepare("persona_chat/both_revised", tmp_path, tmp_path / "again")


def test_files_without_candidates_go_before_those_with(manual, tmp_path):
    for part, dialogues in (("train", TRAIN), ("valid", VALID)):
        bare = [(persona, [turn[:2] for turn in lines][:1]) for persona, lines in dialogues]
        (manual / f"{part}_self_original_no_cands.txt").write_text(parlai(bare))
    directory = str(prepare("persona_chat/self_original_no_cands", manual, tmp_path / "data"))
    assert len(load_records(directory, "validation")[0].messages) == 2
    with pytest.raises(UserError, match=r"no split 'validation_ranking'"):
        load_records(directory, "validation_ranking")


def test_every_turn_with_candidates_is_ranked(manual, tmp_path):
    directory = prepare("persona_chat", manual, tmp_path / "data")
    first, second = load_records(str(directory), "validation_ranking")
    whole = load_records(str(directory), "validation")[0]
    assert first.candidates == ("hi v", "x") and second.candidates == ("reply v", "wrong one", "wrong two")
    assert first.messages == whole.messages[:2] and second == dataclasses.replace(whole, source=second.source)


def training_json(dialogues) -> dict[str, list]:
    """The JSON form of dialogues whose turns have candidates, written the way the format is described."""
    entries = []
    for persona, lines in dialogues:
        said: list[str] = []
        utterances = []
        for partner, reply, candidates in lines:
            wrong = [c for c in candidates if c != reply]
            utterances.append({"candidates": [*wrong, reply], "history": [*said, partner]})
            said += [partner, reply]
        entries.append({"personality": persona, "utterances": utterances})
    return {"train": entries, "valid": entries[:1]}


def test_the_training_data_as_json_is_the_same(manual, tmp_path):
    dialogues = [(DOGS, WITH_CANDIDATES), (BIRDS, WITH_CANDIDATES[:1])]
    (manual / "personachat_self_original.json").write_text(json.dumps(training_json(dialogues)), "utf-8-sig")
    (manual / "train_self_original.txt").write_text(parlai(dialogues))
    (manual / "valid_self_original.txt").write_text(parlai(dialogues[:1]))
    read = []
    for config in ("self_original", "convai2_json"):
        directory = str(prepare(f"persona_chat/{config}", manual, tmp_path / "data"))
        names = ("train", "validation", "validation_ranking")
        read.append([[dataclasses.replace(r, source="") for r in load_records(directory, name)] for name in names])
    assert read[0] == read[1] and list(map(len, read[0])) == [2, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(train=3), r"json: must be a JSON object with a list 'train'"),
        (lambda e: e["train"].append(3), r"json train\[1\]: must be a JSON object with the key 'personality'"),
        (
            lambda e: e["train"][0].update(personality=[" "]),
            r"train\[0\]: personality must be a list of texts",
        ),
        (lambda e: e["train"][0].update(utterances=[]), r"train\[0\]: utterances must be a list"),
        (lambda e: e["train"][0]["utterances"][1].pop("history"), r"\[0\].utterances\[1\]: must be .* key 'history'"),
        (
            lambda e: e["train"][0]["utterances"].pop(0),
            r"utterances\[0\]: history must be that of the utterance",
        ),
    ],
)
def test_a_json_entry_that_breaks_the_form_is_named(tmp_path, change, message):
    entries = training_json([(DOGS, WITH_CANDIDATES)])
    change(entries)
    (tmp_path / "personachat_self_original.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message):
        prepare("persona_chat/convai2_json", tmp_path, tmp_path / "data")


def test_people_of_the_human_evaluation_are_the_users(tmp_path):
    def said(*texts: str) -> list[dict[str, str]]:
        return [{"text": t[1:], "sender_class": {"h": "Human", "b": "Bot"}[t[0]]} for t in texts]

    profiles = {"bot_profile": ["i am a bot."], "eval_score": 4, "profile_match": ""}
    dialogues = [
        {"dialog": said("hHello", "bhi", "bwho are you?", "hann", "hand  you?", "bbob"), "user_profile": ["i run."]},
        {"dialog": said("h/start", "bhi"), "user_profile": ["i never answer."]},
        *({"dialog": said("bhi", "hho"), "user_profile": [f"i am {n}."]} for n in range(8)),
    ]
    (tmp_path / "data_tolokers.json").write_text(json.dumps([each | profiles for each in dialogues]))
    directory = str(prepare("persona_chat/convai2_evaluation", tmp_path, tmp_path / "data"))
    train, held_out = load_records(directory, "train"), load_records(directory, "validation")
    assert len(train) == 7 and len(held_out) == 2
    assert not {r.user_id for r in train} & {r.user_id for r in held_out}
    (ann,) = (record for record in [*train, *held_out] if record.context == ("i run.",))
    assert [m["content"] for m in ann.messages] == ["hi who are you?", "ann and you?"]


def generated_csv(*conversations: tuple[str, str, str]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *conversations])
    return text.getvalue().encode()


def test_both_users_of_generated_dialogues_are_users(tmp_path):
    talk = "* * *\nUser 1: Hi!\n[A few minutes later]\n(They walk\n"
    talk += 'User 2: Hello, "Ann".\n**User 1:** What do you do?\nUser 2: I list:\n1. sleep\n\n2. run'
    content = generated_csv(
        ("I run.\nI ski.", "I sleep.", talk), ("I ski.\nI run.", "I nap.", "User 1: Hi!"), ("I nod.", "I hum.", "")
    )
    (tmp_path / "valid.csv").write_bytes(b"\xef\xbb\xbf" + content)
    np.save(tmp_path / "valid_embeddings_user1.npy", np.eye(3, dtype=np.float32))
    np.save(tmp_path / "valid_embeddings_user2.npy", np.eye(3, dtype=np.float32)[[1, 2, 0]])
    directory = prepare("persona_chat/synthetic", tmp_path, tmp_path / "data")
    one, two = load_records(str(directory), "validation")
    assert (one.context, two.context) == (("I run.", "I ski."), ("I sleep.",))
    assert [m["content"] for m in one.messages] == ['Hello, "Ann".', "What do you do?"]
    assert [m["content"] for m in two.messages] == [
        "Hi!",
        'Hello, "Ann".',
        "What do you do?",
        "I list: 1. sleep 2. run",
    ]
    table = load_table(str(tmp_path / "data" / "persona_chat" / "embeddings_synthetic"))
    vectors = table.lookup([one.user_id, two.user_id], ["", ""])
    np.testing.assert_allclose(vectors, [[0.5, 0.5, 0], [0, 1, 0]])  # the first user stands in both rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n", r"valid.csv:1: the header must be user 1 personas,"),
        (generated_csv(), r"valid.csv: holds no conversation"),
        (
            generated_csv(("a", "b", "User 1: x\nUser 2: y"), ("a", " ", "c")),
            r":4: column 'user 2 personas' is empty \(--on-bad-rec",
        ),
        (generated_csv() + b"a,b\r\n", r":2: 2 columns, expected 3 \(user 1"),
        (generated_csv() + b"a,b,caf\xe9\r\n", r":2: column 'Best Generated Conversation' is not UTF-8"),
        (generated_csv() + b'a,b,"open\r\n', r":2: malformed CSV in the row that begins here \(unexpected end"),
    ],
)
def test_a_generated_row_that_breaks_the_form_is_named(tmp_path, content, message):
    (tmp_path / "valid.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare("persona_chat/synthetic", tmp_path, tmp_path / "data")


def test_bad_dialogues_are_skipped_and_their_vectors_too(manual, tmp_path, capsys):
    text = parlai(TRAIN).replace("ask b\treply b", "ask b reply b")  # the tab is lost
    (manual / "train_self_original.txt").write_text(text)
    rows = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    np.save(manual / "train_embeddings.npy", rows)
    np.save(manual / "valid_embeddings.npy", rows[:2])
    with pytest.raises(UserError, match=r"train_self_original.txt:7: expected PARTNER<TAB>REPLY"):
        prepare("persona_chat", manual, tmp_path / "data")
    with pytest.raises(UserError, match=r"1 of 6 records are bad, more than max_bad_share=0.1; .*the first: .*:7: exp"):
        prepare("persona_chat", manual, tmp_path / "data", bad=BadRecords("skip", 0.1))
    directory = prepare("persona_chat", manual, tmp_path / "data", bad=BadRecords("skip", 0.2))
    assert "skipped 1 of 8 records as bad; the first: " in capsys.readouterr().err
    train = load_records(str(directory), "train")
    assert last_replies(train) == ["reply a", "reply c", "reply d"]
    table = load_table(str(tmp_path / "data" / "persona_chat" / "embeddings"))
    np.testing.assert_allclose(table.lookup([train[2].user_id], [""]), rows[3:5].mean(0, keepdims=True), rtol=1e-6)


def counts(dialogues: list[Dialogue]) -> tuple[int, int, int]:
    """Dialogues, turns, and distinct personas as sets."""
    return len(dialogues), sum(len(d.turns) for d in dialogues), len({frozenset(d.persona) for d in dialogues})


FULL = os.environ.get("E2P_PERSONA_CHAT_DIR")


@pytest.mark.skipif(FULL is None, reason="E2P_PERSONA_CHAT_DIR does not name a directory with the full release")
def test_the_published_counts_of_the_full_release():
    """Zhang et al. (2018): 10,907 dialogues of 162,064 utterances. ConvAI2 has the training dialogues from both sides
    and keeps its test set to itself. 20 candidates a turn, the true one among them, which the reader checks.
    """
    found = {}
    for part in ("train", "valid", "test"):
        if (path := Path(FULL or "") / f"{part}_self_original.txt").is_file():
            dialogues = read_dialogues(path, BadRecords())
            found[part] = counts(dialogues)[:2]
            ranked = [record for dialogue in dialogues for record in dialogue.rankings("self")]
            assert {len(record.candidates) for record in ranked} <= {20}
            assert not ranked or len(ranked) == found[part][1]
    if "test" in found:
        assert found == {"train": (8_939, 65_719), "valid": (1_000, 7_801), "test": (968, 7_512)}
        assert [sum(column) for column in zip(*found.values(), strict=True)] == [10_907, 162_064 // 2]
    else:
        assert found["train"] in ((17_878, 131_438), (8_939, 65_719))
        assert found["valid"] == (1_000, 7_801)


def test_the_counts_of_the_part_at_hand(shared):
    """Those that its README states."""
    original = shared / "data" / "persona_chat"
    assert counts(read_dialogues(original / "train_self_original.txt", BadRecords())) == (1_072, 7_915, 931)
    assert counts(read_dialogues(original / "valid_self_original.txt", BadRecords())) == (600, 4_690, 455)


def test_real_generated_dialogues(shared, tmp_path):
    """1,000 conversations, and the vectors that belong to them."""
    original = shared / "data" / "synthetic_persona_chat"
    both = read_both(original / "valid.csv", BadRecords())
    assert len(both) == 1_000
    directory = prepare("persona_chat/synthetic", original, tmp_path)
    records = load_records(str(directory), "validation")
    assert len(records) == sum(bool(dialogue.turns) for pair in both for dialogue in pair) > 1_990
    table = load_table(str(tmp_path / "persona_chat" / "embeddings_synthetic"))
    for number in (0, 500, 999):
        for user, dialogue in zip("12", both[number], strict=True):
            row = np.load(original / f"valid_embeddings_user{user}.npy")[number]
            np.testing.assert_allclose(table.lookup([user_id(dialogue.persona)], [""])[0], row, atol=1e-5)


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
