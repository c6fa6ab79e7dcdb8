"""Users whom a prefix table does not hold: among many, as the null user, or by a vector that came just now."""

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engines import load_prompt_embeds
from test_transformers import load

from e2p_jax.datasets import synthetic
from e2p_jax.errors import UserError
from e2p_jax.export.client import EngineClient
from e2p_jax.export.prefix_reader import PrefixTable
from e2p_jax.export.prefix_table import export_prefixes
from e2p_jax.export.transformers import export_transformers
from e2p_jax.prefix.numpy_projector import project
from e2p_jax.registry import PROJECTORS, Choice

HI = [{"role": "user", "content": "hi"}]


def test_one_absent_user_fails_no_others(make_run: Callable, tmp_path: Path):
    run = make_run(null=0.3)
    export_prefixes(run, tmp_path / "table", "bfloat16")
    table = PrefixTable(tmp_path / "table")
    null = np.asarray(run.model.merged.projector(np.full(run.inputs.table.width, np.nan, np.float32)))
    rows, found = table.get_many(["user-3", "nobody", "user-29", ""])
    assert found.tolist() == [True, False, True, False] and rows.dtype.name == "bfloat16"
    assert np.array_equal(rows[found], table.lookup(["user-3", "user-29"]))
    assert (rows[~found] == null.astype(rows.dtype)).all() and np.array_equal(table.null, null.astype(rows.dtype))
    client = EngineClient(table, "mine", unknown="null")
    stranger, known = client.embeddings("nobody", HI), client.embeddings("user-3", HI)
    assert np.array_equal(stranger[2:], known[2:]) and np.array_equal(stranger[1], null[0].astype(rows.dtype))
    assert client.vllm_completion("nobody", HI) == client.vllm_completion("else", HI)
    with pytest.raises(UserError, match="'nobody' has no prefix"):
        EngineClient(table, "mine").embeddings("nobody", HI)
    export_prefixes(make_run(), tmp_path / "plain", "bfloat16")
    plain = PrefixTable(tmp_path / "plain")
    rows, found = plain.get_many(["nobody", "user-1"])
    assert plain.null is None and not rows[0].any() and found.tolist() == [False, True]
    assert [len(each) for each in plain.get_many([])] == [0, 0]
    with pytest.raises(UserError, match=r"no null user; train with train\.null_user_rate above 0"):
        EngineClient(plain, "mine", unknown="null")


@pytest.mark.parametrize(("num_tokens", "kind", "null"), [(1, "mlp", 0.3), (3, "linear", 0.0)])
def test_a_vector_is_projected_in_numpy(make_run: Callable, tmp_path: Path, num_tokens: int, kind: str, null: float):
    """As JAX does it, to float32 rounding: of users in the table, of others, and of ones far off."""
    run = make_run("after_bos", num_tokens, kind, null=null)
    export_prefixes(run, tmp_path / "table", "float32")
    table = PrefixTable(tmp_path / "table")
    vectors = np.stack([synthetic.vector(user) for user in range(60)])
    vectors[50:] *= 1000  # held to the bound
    wanted, made = np.asarray(run.model.merged.projector(vectors)), table.project(vectors)
    assert made.dtype == np.float32 and made.shape == wanted.shape
    scale = np.abs(wanted).max(axis=(1, 2), keepdims=True)
    rms = np.sqrt(np.mean(np.square(wanted[50:]), axis=-1))
    assert rms == pytest.approx(float(run.model.merged.projector.bound), rel=1e-5)
    assert (np.abs(made - wanted) <= 2e-6 * scale).all()
    assert (np.abs(made[:30] - table.lookup([f"user-{user}" for user in range(30)])) <= 2e-6 * scale[:30]).all()
    client = EngineClient(table, "mine")
    body = client.vllm_completion(vectors[45], HI)
    sent = load_prompt_embeds(body["prompt_embeds"], 32).numpy()
    assert np.array_equal(sent[1 : 1 + num_tokens], table.project(vectors[45:46])[0])
    assert len(base64.b64decode(client.vllm_completion("user-1", HI)["prompt_embeds"])) > 128


def test_a_bound_on_soft_tokens_holds_in_numpy(make_run: Callable, tmp_path: Path):
    """Far off, a token has the bound's root mean square and the direction that it has without one."""
    export_prefixes(make_run("after_bos", 3, "linear"), tmp_path / "table", "float32")
    table = PrefixTable(tmp_path / "table")
    settings, values = table.manifest["config"]["projector"], table._projector
    vectors = np.stack([synthetic.vector(1), 1000 * synthetic.vector(2)])
    free = project(settings | {"max_scale": 0.0}, values, vectors, np.dtype(np.float32))
    held = project(settings | {"max_scale": 8.0, "init_scale": 2.0}, values, vectors, np.dtype(np.float32))
    bound = 4 * np.sqrt(np.mean(values["token_mean"] ** 2 + values["token_std"] ** 2))
    before, after = (np.sqrt(np.mean(soft.astype(np.float64) ** 2, axis=-1)) for soft in (free, held))
    assert (before[0] < bound).all() and np.array_equal(held[0], free[0]) and (before[1] > bound).all()
    np.testing.assert_allclose(after[1], bound, rtol=1e-6)
    np.testing.assert_allclose(held[1] / after[1][:, None], free[1] / before[1][:, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "kind"), [(1, "mlp"), (3, "linear")])
def test_no_finite_vector_is_too_long_for_the_bound(make_run: Callable, tmp_path: Path, num_tokens: int, kind: str):
    """Not where the squares of soft tokens are beyond float32: in JAX, NumPy and torch alike."""
    run = make_run("after_bos", num_tokens, kind)
    export_prefixes(run, tmp_path / "table", "float32")
    export_transformers(run, tmp_path / "out", include_backbone=True)
    vectors = np.stack([synthetic.vector(user) for user in range(4)]) * np.float32([[1], [1e3], [1e25], [0]])
    vectors[3, 0] = 1e38 * min(1, run.model.params["projector"]["input_std"][0])
    wanted = np.asarray(run.model.merged.projector(vectors))
    rms = np.sqrt(np.mean(np.square(wanted[1:]), axis=-1))
    assert rms == pytest.approx(float(run.model.merged.projector.bound), rel=1e-5)
    assert not np.array_equal(wanted[1], wanted[3])
    model, _ = load(tmp_path / "out")
    for made in (
        PrefixTable(tmp_path / "table").project(vectors),
        model.projector(torch.tensor(vectors)).detach().numpy(),
    ):
        np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_what_cannot_be_projected_is_named(make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run()
    export_prefixes(run, tmp_path / "table", "float16")
    table, width = PrefixTable(tmp_path / "table"), run.inputs.table.width
    for wrong in (np.zeros((2, width + 1)), np.zeros(width), np.full((1, width), np.nan)):
        with pytest.raises(UserError, match=rf"give \[N, {width}\], every number finite"):
            table.project(wrong)
    far = np.zeros((2, width), np.float32)
    far[1] = 3e38
    with pytest.raises(UserError, match="vector 1: the soft tokens are not finite in float16"):
        table.project(far)
    monkeypatch.setitem(PROJECTORS, "elsewhere", Choice("e2p_jax.errors", "a plugin's kind that has JAX alone"))
    for kind in ("elsewhere", "unheard-of"):
        with pytest.raises(UserError, match=f"projector.kind {kind} has no project_numpy: put the vector into the"):
            project({"kind": kind}, {}, far, far.dtype)
    with pytest.raises(UserError, match="of an earlier version of e2p_jax, without the projector; rerun"):
        project({"kind": "mlp"}, {}, far, far.dtype)
    path = tmp_path / "table" / f"{table.manifest['parameters']}.projector.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for look in (lambda: PrefixTable(tmp_path / "table").project(far), lambda: PrefixTable(path.parent).null):
        with pytest.raises(UserError, match=rf"{path.name}: missing or damaged; rerun `e2p prefixes`"):
            look()
    assert export_prefixes(run, tmp_path / "table", "float16").mended == (path.name,)
    assert table.project(far[:1]).shape == (1, 1, 32)
