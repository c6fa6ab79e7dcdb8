"""The embedded backbone's training text, as benchmarks/embedded_backbone/corpus.py makes it."""

import gzip
import json
import re
from pathlib import Path

import pytest

from benchmarks.embedded_backbone import corpus as made
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.prepared import load_records
from e2p_jax.errors import UserError


def test_sources_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match=r"self_dialogue.jsonl.gz, .*schema_guided.jsonl.gz: not found"):
        list(made.records(tmp_path))


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> tuple[Path, dict[tuple[str, ...], str]]:
    """A small corpus in the true form, its usable dialogues, and a few generated users in place of 16,000."""
    monkeypatch.setattr(synthetic, "PRETRAINING", range(100_000, 100_060))
    monkeypatch.setattr(made, "SOURCES", {"self_dialogue.jsonl.gz": 1.0, "schema_guided.jsonl.gz": 0.35})
    monkeypatch.setattr(made, "VALIDATION_SHARE", 0.2)
    directory, usable = tmp_path / "corpus", {}
    directory.mkdir()
    for name in made.SOURCES:
        lines = []
        for n in range(80):
            turns = [f"{name[:6]} dialogue{n:03d} turn{t} says word{chr(97 + n % 26) * 4}{t}" for t in range(3 + n % 4)]
            if n == 7:
                turns[2] = "  "
            elif len(turns) > 3:
                usable[tuple(turns)] = name
            lines.append(json.dumps({"turns": [f" {turn} " for turn in turns], "topic": "x"}) + "\n")
        (directory / name).write_bytes(gzip.compress("".join(lines).encode()))
    return directory, usable


def test_what_is_written_is_what_is_made(corpus, tmp_path):
    directory, usable = corpus
    made.main(directory, tmp_path / "corpus.jsonl")
    records = {split: load_records(str(tmp_path / "corpus.jsonl"), split) for split in ("train", "validation")}
    for split, read in records.items():
        ours = [record for record, name in made.records(directory) if name == split]
        assert [(r.user_id, r.context, r.messages) for r in read] == [(r.user_id, r.context, r.messages) for r in ours]
    users = [[record.user_id for record in read] for read in records.values()]
    assert len(users[0]) > 2 * len(users[1]) > 0 and len({*users[0], *users[1]}) == len(users[0]) + len(users[1])
    # All of one source, a part of the other; no short dialogue, none with an empty turn; echoes repeat the user.
    spoken = []
    for record in [*records["train"], *records["validation"]]:
        if record.user_id.startswith("dialogue"):
            turns = tuple(m["content"] for m in record.messages if m["role"] != "system")
            echo = [u for u in usable if turns[::2] == turns[1::2] == u[::2]]
            spoken.append(echo[0] if echo else turns)
            system = [m["content"] for m in record.messages if m["role"] == "system"]
            assert system == (["\n".join(record.context)] if record.context else [])
    assert set(spoken) <= usable.keys() and len(spoken) == len(set(spoken))
    shares = [sum(usable[turns] == name for turns in spoken) for name in made.SOURCES]
    assert shares[0] == sum(name == "self_dialogue.jsonl.gz" for name in usable.values())
    assert 0 < shares[1] < 0.6 * shares[0]
    assert len(users[0]) + len(users[1]) == len(spoken) + 60


def closed(text: str) -> str:
    """Without the spaces before punctuation."""
    return re.sub(r" ([.,!?;])", r"\1", text)


def test_generated_personas_show_their_context(corpus):
    directory, _ = corpus
    forms = {"none": 0, "sentences": 0, "words": 0}
    for record, _ in made.records(directory):
        if record.user_id.startswith("user-"):
            user = int(record.user_id.removeprefix("user-"))
            if record.messages[0]["role"] != "system":
                forms["none"] += 1
            elif sorted(map(closed, record.context)) == sorted(synthetic.record(user).context):
                forms["sentences"] += 1
                assert record.messages[0]["content"] == "\n".join(record.context)
            else:
                forms["words"] += 1
                assert record.messages[0]["content"] == " ".join(synthetic.traits(user).values())
            assert closed(record.messages[-1]["content"]) == synthetic.record(user).messages[-1]["content"]
    assert min(forms.values()) > 0


def test_some_records_space_their_punctuation_throughout(corpus):
    directory, _ = corpus
    spaced = closed_up = 0
    for record, _ in made.records(directory):
        if record.user_id.startswith("user-"):
            texts = [message["content"] for message in record.messages]
            marks = [re.findall(r"( ?)[.,!?]", text) for text in texts]
            assert len({mark for found in marks for mark in found}) == 1
            spaced += marks[-1][0] == " "
            closed_up += marks[-1][0] == ""
    assert spaced > 0 and closed_up > 0
