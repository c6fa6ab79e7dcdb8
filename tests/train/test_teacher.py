"""Distillation: what the teacher is, which targets it has, and that it is asked once."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, TrainConfig
from e2p_jax.data.pipeline import PackedDataset
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.errors import Preempted, UserError
from e2p_jax.parallel import distributed
from e2p_jax.prefix import mlp
from e2p_jax.train import loop, teacher
from e2p_jax.train.loop import read_data, train
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.setup import build_model, read_inputs
from e2p_jax.vectors.table import save_table

USERS, LONG, BARE = range(12), 10, 11  # all but the last two are short and have a context


@pytest.fixture(scope="module")
def config(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Eight users are trained on, one of whom says more than fits behind the context, and one of whom has none."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl([synthetic.record(user) for user in USERS], folder / "records.jsonl")
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    lines[LONG]["messages"] *= 3
    lines[BARE]["context"] = []
    for user, line in enumerate(lines):
        line["split"] = "dev_users" if user < 2 else "validation" if user < 4 else "train"
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="synthetic", version="1")
    return Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(
            path=str(folder / "records.jsonl"),
            embeddings=str(folder / "table"),
            dev_split="dev_users",
            seq_len=256,
            cache=str(folder / "cache"),
        ),
        projector=mlp.Settings(hidden_size=16),
        train=TrainConfig(
            steps=4,
            rows=4,
            warmup_steps=1,
            eval_every=4,
            checkpoint_every=1,
            log_every=1,
            distill=0.8,
            teacher_tokens=8,
        ),
        evaluate=EvaluateConfig(conditions=()),
    )


def taught(config: Config) -> PackedDataset:
    inputs = read_inputs(config)
    data = read_data(inputs)
    return teacher.teach(data.train, inputs, build_model(inputs, data.population))


def forbid(*_: Any) -> None:
    raise AssertionError("the teacher was asked again")


def test_the_teacher_is_the_backbone_that_reads_the_context(
    config: Config, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its likeliest tokens at the student's own targets, those of transformers; none where there is no context."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_backbone)
    found = taught(config)
    assert found.taught is not None and found.teacher is not None
    assert "train.distill: 1 of 8 conversations have no context and so no teacher" in capsys.readouterr().err
    sources = [int(source.rpartition(":")[2]) - 1 for source in found.examples.sources]
    assert sorted(sources) == list(range(4, 12))
    for number, (user, ours, theirs) in enumerate(zip(sources, found.examples, found.taught.examples, strict=True)):
        ids, shares = found.teacher.shares(number)
        if user == BARE:
            assert len(ids) == 0
            continue
        np.testing.assert_array_equal(ours.tokens[ours.is_target], theirs.tokens[theirs.is_target])
        assert len(theirs.tokens) > len(ours.tokens) > 200 * (user == LONG)  # older turns are lost to both
        with torch.no_grad():
            logits = model(torch.tensor(theirs.tokens[None].astype(np.int64))).logits[0].float()
        expected = logits.log_softmax(-1)[np.flatnonzero(theirs.is_target) - 1].topk(8)
        np.testing.assert_allclose(np.log(shares / 0.8), expected.values, atol=0.01)
        np.testing.assert_array_equal(ids[:, 0], expected.indices[:, 0])
        probabilities = logits.log_softmax(-1)[np.flatnonzero(theirs.is_target) - 1].gather(1, torch.tensor(ids).long())
        np.testing.assert_allclose(probabilities, expected.values, atol=1e-4)  # whatever the order of equals


def test_a_packed_row_has_what_its_segments_have(config: Config) -> None:
    """Every target's tokens and shares stand beside it, wherever its segment is; nothing stands beside the rest."""
    found = taught(config)
    assert found.teacher is not None and max(map(len, found.rows)) > 1
    batch = found.batch([*range(len(found.rows)), -1])
    shape = len(found.rows) + 1, found.budget.targets, 8
    assert batch["teacher_ids"].shape == batch["teacher_shares"].shape == shape
    expected = {name: np.zeros(shape, batch[name].dtype) for name in ("teacher_ids", "teacher_shares")}
    for row, numbers in enumerate(found.rows):
        place = 0
        for number in numbers:
            for name, values in zip(expected, found.teacher.shares(number), strict=True):
                expected[name][row, place : place + len(values)] = values
            place += int(found.examples.target_counts[number])
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values)


def test_borrowed_conversations_have_another_users_context_and_vector_and_the_teacher_alone(config: Config) -> None:
    """Behind the usual ones, of which nothing changes; the user without a context is nobody to borrow for."""
    usual, found = taught(config), taught(config.change(train={"borrowed": 2}))
    assert usual.teacher and found.teacher and found.taught and found.taught.own == len(usual.examples) == 8
    assert len(found.examples) == 8 + 2 * 7 == len(found.vectors)
    encoder, tables = read_inputs(config).encoder, {user: synthetic.vector(user) for user in USERS}
    pairs = set()
    for number, example in enumerate(found.examples):
        source, user = int(example.source.rpartition(":")[2]) - 1, int(example.user_id.removeprefix("user-"))
        ids, shares = found.teacher.shares(number)
        np.testing.assert_allclose(found.vectors.gather([number])[0], tables[user], rtol=1e-6)
        pairs.add((source, user))
        if number < 8:
            assert source == user
            np.testing.assert_array_equal(ids, usual.teacher.shares(number)[0])
            np.testing.assert_array_equal(shares, usual.teacher.shares(number)[1])
            continue
        assert source != user != BARE
        np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-6)
        assert len(shares) == example.is_target.sum() > 0
        read = encoder.tokenizer.decode(found.taught.examples[number].tokens)
        assert "\n".join(synthetic.record(user).context) in read
    assert len(pairs) == len(found.examples)  # nobody meets anybody twice


def test_each_setting_of_a_teacher_has_answers_of_its_own(config: Config) -> None:
    def shares(**fields: Any) -> np.ndarray:
        found = taught(config.change(train=fields)).teacher
        assert found is not None
        return found.shares(0)[1]

    usual, half = shares(), shares(distill=0.4)
    np.testing.assert_allclose(half, usual / 2, rtol=1e-6)
    np.testing.assert_array_equal(shares(teacher_tokens=3), usual[:, :3])
    assert (shares(teacher_temperature=0.5)[:, 0] > usual[:, 0]).all()
    assert (usual.sum(-1) <= 0.8).all()


def test_a_run_asks_once_and_goes_on_bit_for_bit(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a step and begun again it ends as if left alone; both losses are logged, `dev` by its own."""
    config = config.change(data={"cache": str(tmp_path / "cache")})
    unbroken = train(config, tmp_path / "unbroken")
    (kept,) = (tmp_path / "cache").glob("teacher-*")
    with monkeypatch.context() as patched:
        patched.setattr(teacher, "_ask", forbid)

        @contextlib.contextmanager
        def stop(first: int) -> Any:
            yield lambda number: number == 2

        with pytest.raises(Preempted), monkeypatch.context() as stopped:
            stopped.setattr(distributed, "preemption", stop)
            train(config, tmp_path / "run")
        train(config, tmp_path / "run")
    assert lines(tmp_path / "run") == lines(unbroken)
    values = [line for line in lines(unbroken) if "train/loss" in line]
    assert all(line["train/nll"] != line["train/loss"] for line in values)
    # A damaged answer is not believed.
    whole = (kept / "ids.npy").read_bytes()
    (kept / "ids.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    taught(config)
    assert (kept / "ids.npy").read_bytes() == whole


def lines(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in read_metrics(run / "metrics.jsonl")]


def test_no_context_anywhere_is_an_error(config: Config, tmp_path: Path) -> None:
    write_jsonl([dataclasses.replace(synthetic.record(user), context=()) for user in USERS], tmp_path / "bare.jsonl")
    data = {"path": str(tmp_path / "bare.jsonl"), "cache": "none", "dev_split": "auto"}
    with pytest.raises(UserError, match=r"train\.distill: no training record has a `context`"):
        loop.train(config.change(data=data), tmp_path / "run")
