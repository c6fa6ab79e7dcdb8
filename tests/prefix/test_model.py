"""Slots, packing and the loss of `PrefixModel`."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import SIZES, Segment, make_batch, prefix_model, random_batch, random_segment

from e2p_jax.backbone.attention import whole_rows
from e2p_jax.backbone.layout import Execution
from e2p_jax.prefix.model import Batch, PrefixModel


@nnx.jit
def target_nll(model: PrefixModel, batch: Batch) -> jax.Array:
    return model.target_nll(batch)


@pytest.fixture(scope="module")
def model() -> PrefixModel:
    return prefix_model()


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_packing_is_invisible(num_tokens: int) -> None:
    """Every example's NLL is the same alone, packed with others, and packed in another order; here with a window."""
    model = prefix_model(num_tokens=num_tokens, model_type="mistral", sliding_window=9)
    rng = np.random.default_rng(1)
    segments = [random_segment(rng, length, num_tokens) for length in (20, 33, 7, 41)]

    def nll(rows: list[list[Segment]]) -> list[float]:
        batch = make_batch(rows, length=128, targets=48, segments=4, num_tokens=num_tokens)
        values = np.asarray(target_nll(model, batch))
        sums = []
        for row, members in zip(values, rows, strict=True):
            counts = np.cumsum([len(s.targets) for s in members])
            sums += [part.sum() for part in np.split(row, counts)[:-1]]
        return sums

    alone = nll([[s] for s in segments])
    assert min(alone) > 1.0
    np.testing.assert_allclose(nll([segments, [], [], []]), alone, rtol=1e-5)
    np.testing.assert_allclose(nll([segments[2:], segments[:2], [], []]), alone[2:] + alone[:2], rtol=1e-5)


def test_a_vector_reaches_its_own_segment_only(model: PrefixModel) -> None:
    batch = random_batch()
    changed = np.array(batch["user_embeddings"])
    changed[:, 1] += 1.0
    before, after = target_nll(model, batch), target_nll(model, {**batch, "user_embeddings": changed})
    segment = np.take_along_axis(batch["segment_ids"], batch["target_positions"], axis=1)
    wanted = batch["target_weights"] > 0
    moved = np.abs(np.asarray(after) - np.asarray(before)) > 1e-4
    assert moved[wanted & (segment == 2)].mean() > 0.9
    assert not moved[wanted & (segment != 2)].any()


def test_padding_and_tokens_under_slots_are_invisible(model: PrefixModel) -> None:
    batch = random_batch()
    tokens = np.array(batch["tokens"])
    hidden = (batch["segment_ids"] == 0) | (batch["slots"] >= 0)
    assert hidden.sum() > 12
    tokens[hidden] = 5
    np.testing.assert_array_equal(target_nll(model, {**batch, "tokens": tokens}), target_nll(model, batch))


def test_attention_hears_of_the_longest_segment(model: PrefixModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel allots by it; the batch says it by a shape, so that the compiler knows it."""
    heard = []

    def listening(kind: str, segment_ids: jax.Array, config: Any, segments: int, longest: int | None) -> Any:
        heard.append((segments, longest))
        return whole_rows("xla", segment_ids, config, segments, longest)

    monkeypatch.setattr("e2p_jax.backbone.decoder.whole_rows", listening)
    batch = random_batch()
    segments = batch["user_embeddings"].shape[1]
    plain = model.target_nll(batch)
    np.testing.assert_array_equal(model.target_nll({**batch, "longest": np.zeros((len(plain), 64), np.int8)}), plain)
    assert heard == [(segments, None), (segments, 64)]


def test_embed_places_the_soft_tokens(model: PrefixModel) -> None:
    batch = random_batch()
    x = np.asarray(model.embed(batch["tokens"], batch["slots"], batch["user_embeddings"]))
    expected = np.asarray(model.backbone.embedding[...])[batch["tokens"]]
    soft = np.asarray(model.projector(jnp.asarray(batch["user_embeddings"])))
    for row, place in np.argwhere(batch["slots"] >= 0):
        expected[row, place] = soft[row, batch["slots"][row, place], 0]
    np.testing.assert_array_equal(x, expected)


def test_nll_against_pytorch(model: PrefixModel) -> None:
    """From the logits of all positions, which training never makes."""
    batch = random_batch()
    x = model.embed(batch["tokens"], batch["slots"], batch["user_embeddings"])
    hidden, _ = model.backbone(x, jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]))
    logits = torch.tensor(np.asarray(model.backbone.logits(hidden)))
    nll = np.asarray(target_nll(model, batch))
    checked = 0
    for row, target in np.argwhere(batch["target_weights"] > 0):
        place, token = batch["target_positions"][row, target], batch["target_ids"][row, target]
        assert token == batch["tokens"][row, place + 1]
        reference = torch.nn.functional.cross_entropy(logits[row, place], torch.tensor(token, dtype=torch.long))
        assert nll[row, target] == pytest.approx(reference.item(), rel=1e-5, abs=1e-5)
        checked += 1
    assert checked > 50
    assert (nll[batch["target_weights"] == 0] == 0).all()


def test_a_dialogue_is_the_sum_of_its_turns(model: PrefixModel) -> None:
    """One segment with three replies as targets, against one example a reply with the history before it."""
    tokens = np.random.default_rng(4).integers(1, SIZES["vocab_size"], 60).tolist()
    vector = np.full(8, 0.5)
    replies = [range(8, 17), range(25, 31), range(44, 61)]
    whole = Segment(tokens, [place for reply in replies for place in reply], vector)
    turns = [Segment(tokens[: reply.stop - 1], list(reply), vector) for reply in replies]
    sizes: dict[str, Any] = {"length": 128, "targets": 48, "segments": 4}
    together = np.asarray(target_nll(model, make_batch([[whole]], **sizes)))[0]
    apart = np.asarray(target_nll(model, make_batch([[turn] for turn in turns], **sizes)))
    ends = list(itertools.accumulate(len(reply) for reply in replies))
    for row, start, end in zip(apart, [0, *ends], ends, strict=False):
        np.testing.assert_allclose(row[: end - start], together[start:end], rtol=1e-5)
    assert together.sum() == pytest.approx(apart.sum(), rel=1e-5)


def test_remat_and_unrolling_change_nothing_but_memory_and_work() -> None:
    batch = random_batch(rows=1)

    def value_and_grad(execution: Execution) -> Any:
        graph, state = nnx.split(prefix_model(execution=execution, num_hidden_layers=6))
        step = jax.jit(jax.value_and_grad(lambda s: jnp.sum(nnx.merge(graph, s).target_nll(batch))))
        compiled = step.lower(state).compile()
        assert ('"n":"6"' in compiled.as_text()) != execution.unroll  # a loop of six rounds
        return *compiled(state), compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    loss, grads, memory, flops = value_and_grad(Execution())
    loss_remat, grads_remat, memory_remat, flops_remat = value_and_grad(Execution(remat=True))
    loss_unrolled, grads_unrolled, *_ = value_and_grad(Execution(unroll=True))
    assert memory_remat < memory / 1.5
    assert flops < 0.9 * flops_remat  # without it no product is computed twice
    for other, others in ((loss_remat, grads_remat), (loss_unrolled, grads_unrolled)):
        assert float(loss) == pytest.approx(float(other), rel=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
