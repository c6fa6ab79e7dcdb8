"""`e2p drift`: an unchanged table, one that is mapped, one of other users, and one with users missing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.cli import main
from e2p_jax.datasets import synthetic
from e2p_jax.errors import UserError
from e2p_jax.evaluate.drift import ALIGNED, _statistics, aligned_cosine, drift
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.train.run import open_run
from e2p_jax.vectors.table import open_table, save_table

USERS = range(24)
IDS = [f"user-{user}" for user in USERS]


def save(path: Path, vectors: np.ndarray, ids: list[str] = IDS) -> str:
    save_table(path, ids, vectors.astype(np.float32), name="t", version="1")
    return str(path)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.stack([synthetic.vector(user) for user in USERS])


def run_drift(learned_run: Path, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(["drift", str(learned_run), "--old", old, "--new", new, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_verdicts(learned_run: Path, vectors: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = save(tmp_path / "old", vectors)
    same = run_drift(learned_run, old, save(tmp_path / "same", vectors), capsys)
    assert not same["retrain"] and same["verdict"].startswith("keep the projector: 100 %")
    assert same["nll_change"]["mean"] == 0 and same["kept"] == [1, 1, 1] and same["users"] == 24
    assert same["cosine"] == pytest.approx(1) and same["token_change"] == 0 and same["gain_old"][1] > 0.1

    near = save(tmp_path / "near", vectors + 0.02 * np.random.default_rng(0).normal(size=vectors.shape))
    assert not run_drift(learned_run, old, near, capsys)["retrain"]

    many = np.stack([synthetic.vector(user) for user in range(400)])
    ids = [f"user-{user}" for user in range(400)]
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(64, 64)))
    whole = save(tmp_path / "whole", many, ids)
    for count, tells in ((400, True), (24, False)):  # so few users can be turned to anything
        new = save(tmp_path / f"turned-{count}", (many @ turn)[:count], ids[:count])
        turned = run_drift(learned_run, whole, new, capsys)
        assert turned["retrain"] and ("aligning the new table would do" in turned["verdict"]) == tells
        assert (turned["aligned_cosine"] > 0.99) == tells and abs(turned["cosine"]) < 0.5 and turned["users"] == 24

    others = run_drift(learned_run, old, save(tmp_path / "others", vectors[::-1]), capsys)
    assert others["retrain"] and others["kept"][0] < 0.5 and others["nll_change"]["low"] > 0
    assert "aligning" not in others["verdict"] and others["aligned_cosine"] < 0.5


def test_a_linear_map_is_told_from_other_vectors():
    """Spreads differ, means are far from zero: a rotation of such vectors is none of standardised ones."""
    rng = np.random.default_rng(3)
    spread, far = np.arange(1, 65) ** -1.0, rng.normal(size=64)
    own, other = (rng.normal(size=(600, 64)) * spread + far for _ in range(2))
    turn, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    old = (own - far) / spread

    def cosine(new: np.ndarray, users: int = 600) -> float:
        return aligned_cosine(old[:users], ((new.astype(np.float32) - far) / spread)[:users], 24)

    mapped = [
        own @ turn,
        3 * own @ turn + 5,
        own @ turn * rng.uniform(0.5, 2, 64),
        old @ turn,
        old @ turn * spread + far,
    ]
    assert min(map(cosine, mapped)) > 0.95
    partly = np.where(np.arange(600)[:, None] % 3, other, own)
    half = np.where(np.arange(64) % 2, other, own)
    assert all(cosine(new @ turn) < ALIGNED for new in (partly, half, (own + other) / 2))
    assert abs(cosine(other @ turn)) < 0.1
    for users in (2, 3, 24, 40):  # as many as can be mapped to anything
        assert cosine(own @ turn, users) < ALIGNED and abs(cosine(other @ turn, users)) < 0.3


def test_missing_users_are_counted_and_left_out(
    learned_run: Path, vectors: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    old, fewer = save(tmp_path / "old", vectors), save(tmp_path / "fewer", vectors[:20], IDS[:20])
    found = run_drift(learned_run, old, fewer, capsys)
    assert (found["users"], found["missing"]) == (20, 4)
    assert main(["drift", str(learned_run), "--old", old, "--new", fewer]) == 0
    assert "in both tables: 20, others: 4" in capsys.readouterr().out


def test_refusals(learned_run: Path, vectors: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = save(tmp_path / "old", vectors)
    narrow, strange = (
        save(tmp_path / "narrow", vectors[:, :8]),
        save(tmp_path / "strange", vectors, [f"x{i}" for i in IDS]),
    )
    for new, words, more in [
        (narrow, "width 8", []),
        (strange, "0 users of the split in common", []),
        (old, "--keep must be", ["--keep", "0"]),
    ]:
        assert main(["drift", str(learned_run), "--old", old, "--new", new, *more]) == (2 if more else 1)
        message = capsys.readouterr().err
        assert words in message.splitlines()[-1], message


def test_no_verdict_where_there_is_nothing_to_keep(
    learned_run: Path, vectors: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With other users' vectors for an old table its gain is not above zero: a share of that says nothing."""
    worse, right = save(tmp_path / "old", np.roll(vectors, 5, axis=0)), save(tmp_path / "new", vectors)
    found = run_drift(learned_run, worse, right, capsys)
    assert found["gain_old"][1] <= 0 < found["gain_new"][1]
    assert found["kept"] is None and found["retrain"] is None
    assert found["verdict"].startswith("no verdict: with the old")

    some = vectors + 0.75 * np.random.default_rng(2).normal(size=vectors.shape) * vectors.std()
    between = run_drift(learned_run, right, save(tmp_path / "some", some), capsys)
    share, low, high = between["kept"]
    assert low < 0.9 <= high and between["retrain"] is None, between
    assert between["verdict"] == (
        f"no verdict: {100 * share:.0f} % [{100 * low:.0f} %, {100 * high:.0f} %] of what a user's own vector is worth "
        "is left; take more users"
    )


def test_a_run_is_judged_as_it_was_trained(learned_run: Path, vectors: np.ndarray, tmp_path: Path):
    """With the context spelled out where it was in training; without users' vectors there, not at all."""
    run, records = open_run(learned_run), [synthetic.record(user) for user in range(6)]
    table, kept = open_table(save(tmp_path / "old", vectors), "null"), {}
    for condition in ("e2p", "e2p+text", "static"):
        config = run.inputs.config.change(data={"condition": condition}, evaluate={"bootstrap_samples": 20})
        other = dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=config))
        if condition == "static":
            with pytest.raises(UserError, match=r"trained under data\.condition=static, on no users' vectors"):
                drift(other, records, table, table)
        else:
            kept[condition] = drift(other, records, table, table).gain_old.value
            scores = evaluate(other, records, "all", [condition]).scores[condition]
            own = _statistics(other, records, condition, {"old": table})["old", "e2p"]
            np.testing.assert_allclose(own[:, 0], scores.nll, rtol=1e-5)
    assert kept["e2p"] != kept["e2p+text"]
