"""`e2p data stats` counts what is there, and `e2p data show` marks what the arrays say."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console

from e2p_jax.cli import main
from e2p_jax.data.show import show_row
from e2p_jax.data.statistics import _vectors
from e2p_jax.datasets import synthetic
from e2p_jax.vectors import population
from e2p_jax.vectors.source import Vectors
from e2p_jax.vectors.table import UserTable, save_table


@pytest.fixture
def flags(tiny_backbone: Path, tmp_path: Path) -> list[str]:
    """30 users, of whom some are odd in known ways; the table lacks two of them and has one vector twice."""
    lines = []

    def add(user: int, split: str, dialogue: int = 0) -> None:
        record = synthetic.record(user, dialogue)
        values = {"user_id": record.user_id, "context": record.context, "messages": record.messages, "split": split}
        lines.append(json.dumps(values))

    for user in range(24):
        add(user, "train")
    add(3, "train", 1)  # a user with two records
    add(5, "train")  # a conversation said before
    for user in (24, 25, 26, 27, 28, 29, 7):  # the last one is also trained on, with the same words
        add(user, "validation")
    add(8, "validation", 1)  # trained on with other words
    add(40, "picks")
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    known = [user for user in (*range(30), 40) if user not in (2, 25)]
    vectors = np.stack([synthetic.vector(user) for user in known])
    vectors[known.index(6)] = vectors[known.index(4)]
    vectors[:, 9] = 1.5
    save_table(tmp_path / "table", [f"user-{user}" for user in known], vectors, name="made", version="1")
    values: dict[str, Any] = {"backbone.path": tiny_backbone, "data.path": tmp_path / "records.jsonl"}
    values |= {"data.embeddings": tmp_path / "table", "data.seq_len": 256, "data.dev_split": "picks"}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_statistics(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", "quickstart", "--json", *flags]) == 0
    values = json.loads(capsys.readouterr().out)
    train, validation = values["splits"]["train"], values["splits"]["validation"]
    assert (train["records"], train["users"], train["users_with_several_records"]) == (26, 24, 2)
    assert (train["repeated_conversations"], train["users_without_vector"], train["leaks"]) == (1, 1, None)
    assert (validation["records"], validation["users_without_vector"]) == (8, 1)
    expected = {"users_in_train": 2, "records_of_users_in_train": 2, "conversations_in_train": 1}
    assert validation["leaks"] == expected
    assert train["full"] == pytest.approx(train["tokens"] / (256 * train["rows"]))
    assert train["row_budget"]["tokens"] == 256
    assert train["tokens_a_record"]["least"] <= train["tokens"] / 26 <= train["tokens_a_record"]["most"]
    vectors = values["vectors"]
    assert (vectors["users"], vectors["width"], vectors["dtype"]) == (29, synthetic.WIDTH, "float32")
    assert (vectors["dimensions_that_never_vary"], vectors["users_with_the_vector_of_another"]) == (1, 1)

    assert main(["data", "stats", "quickstart", *flags]) == 0
    text = capsys.readouterr().out
    assert re.search(r"conversations also in train *│ *│ *0 │ *1", text) and f"{train['full']:.1%}" in text


def test_vectors_are_counted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the whole table, which is never in memory."""
    vectors = np.random.default_rng(0).normal(3.0, 2.0, (300, 8)).astype(np.float32)
    vectors[[7, 8]] = vectors[3], vectors[4]
    vectors[[20, 21]] = [[0.0], [-0.0]]
    table = UserTable([f"u{n}" for n in range(300)], vectors, "table")
    sizes, gather = [], UserTable.gather
    monkeypatch.setattr(UserTable, "gather", lambda self, rows: sizes.append(len(rows)) or gather(self, rows))
    monkeypatch.setattr(population, "_BLOCK", 40 * 8 * 4)
    found = _vectors(table, np.arange(300))
    assert max(sizes) == 40
    assert found["users_with_the_vector_of_another"] == 3
    norms = np.linalg.norm(vectors, axis=1)
    assert found["norm"]["median"] == pytest.approx(np.median(norms)) and found["norm"]["most"] == norms.max()
    assert found["largest_mean"] == pytest.approx(np.abs(vectors.mean(axis=0)).max(), rel=1e-6)
    assert found["std"]["most"] == pytest.approx(vectors.std(axis=0).max(), rel=1e-6)


def test_rows_in_words(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Plain text marks slots and targets; joined without marks it is what was said."""
    null = ["--data.missing_user", "null", "--train.null_user_rate", "0.1"]
    assert main(["data", "show", "quickstart", "-n", "99", *null, "--projector.num_tokens", "2", *flags]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    users = re.findall(r"segment \d+, user (\S+), (null user|vector of length)", out)
    assert len(users) == 26 and [user for user, kind in users if kind == "null user"] == ["user-2"]
    text = out.split("user user-12, ")[1].split("\n", 1)[1]
    slots, said = re.match(r" *<s><slot (\d+)><slot \d+>(.*?)(?=\n  segment|\nrow|\Z)", text, re.DOTALL).groups()
    assert int(slots) % 2 == 0
    replies = re.findall(r"\[\[(.*?)\]\]", said, re.DOTALL)
    own = [m["content"] for m in synthetic.record(12).messages if m["role"] == "assistant"]
    assert [reply.replace("<|end|>", "").strip() for reply in replies] == own
    assert not any(m["content"] in "".join(replies) for m in synthetic.record(12).messages if m["role"] == "user")


def test_colours_on_a_terminal(make_tokenizer: Any) -> None:
    from test_encode import make_encoder

    from e2p_jax.data.pipeline import pack

    encoder = make_encoder(make_tokenizer(), "before_bos", num_tokens=1, seq_len=256)
    data = pack([encoder.encode(synthetic.record(1), "e2p")], Vectors.of(np.ones((1, 3), np.float32)), encoder)
    console = rich.console.Console(force_terminal=True, width=400, color_system="standard", record=True)
    with console.capture() as captured:
        for line in show_row(data, 0, encoder.tokenizer, marks=False):
            console.print(line)
    assert "[[" not in captured.get() and "\x1b[1;32m" in captured.get() and "\x1b[30;45m<slot 0>" in captured.get()


def test_mistakes_are_named(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "quickstart", *flags]) == 1
    assert "user 'user-2' has no vector" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "list", "quickstart"])
