"""Packing: every example once, no budget exceeded, few rows, and the arrays of the batch contract."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example as example_of
from hypothesis import given
from hypothesis import strategies as st

from e2p_jax.data.columns import Ragged
from e2p_jax.data.encode import Example
from e2p_jax.data.examples import Examples
from e2p_jax.data.packing import Budget, best_fit, choose_budget, empty_rows, fill_exactly, fill_row, plan_rows

WIDTH = 3


def example(length: int, targets: int, slot_starts: tuple[int, ...] = (), seed: int = 0) -> Example:
    """`targets` random places of `length` tokens, never the first one."""
    rng = np.random.default_rng(seed)
    is_target = np.zeros(length, bool)
    is_target[1 + rng.permutation(length - 1)[:targets]] = True
    return Example(rng.integers(1, 99, length, dtype=np.int32), is_target, slot_starts, f"user-{seed}")


def examples_of(sizes: list[tuple[int, int]]) -> Examples:
    return Examples.of(example(length, min(targets, length - 1), seed=n) for n, (length, targets) in enumerate(sizes))


SIZES = st.lists(st.tuples(st.integers(2, 128), st.integers(1, 40)), min_size=1, max_size=80)


@example_of(sizes=[(16, 1), (16, 1), (16, 2), (44, 37)], segments=4, most=40)  # equal lengths, unequal targets
@given(sizes=SIZES, segments=st.integers(1, 8), most=st.integers(40, 128))
def test_every_example_in_one_row_and_no_budget_exceeded(
    sizes: list[tuple[int, int]], segments: int, most: int
) -> None:
    examples, budget = examples_of(sizes), Budget(128, most, segments)
    plans = [plan(examples.lengths, examples.target_counts, budget) for plan in (best_fit, fill_exactly)]
    for rows in plans:
        assert sorted(number for row in rows for number in row) == list(range(len(examples)))
        for row in rows:
            assert 1 <= len(row) <= segments
            assert sum(len(examples[n].tokens) for n in row) <= 128
            assert sum(int(examples[n].is_target.sum()) for n in row) <= most
    assert list(map(list, plan_rows(examples, budget))) == list(map(list, min(plans, key=len)))


def test_the_budget_of_a_row() -> None:
    """A tenth more targets than rows hold on average, rounded up to 64, and all of any one example's; no example is
    longer than the least divisor of the row that is of whole blocks of 128.
    """
    even = examples_of([(50, 25)] * 10 + [(100, 25)] * 90)  # 250 of 950 tokens are targets
    assert choose_budget(even, 950) == Budget(950, 320, 950 // 50, longest=950)
    assert choose_budget(examples_of([(100, 1)] * 9 + [(300, 290)]), 512) == Budget(512, 320, 5, longest=512)
    assert choose_budget(examples_of([(100, 99)]), 128) == Budget(
        128, 128, 1, longest=128
    )  # never more than there are tokens
    rows_of = {
        length: [choose_budget(examples_of([(length, 1)]), size).longest for size in (1024, 1536)]
        for length in (128, 129, 300, 600)
    }
    assert rows_of == {128: [128, 128], 129: [256, 256], 300: [512, 384], 600: [1024, 768]}


def test_no_example_is_longer_than_the_budget_says() -> None:
    examples = examples_of([(100, 1), (300, 1)])
    budget = choose_budget(examples, 1536)
    assert empty_rows(2, budget, WIDTH)["longest"].shape == (2, 384)
    assert "longest" not in empty_rows(2, budget._replace(longest=1536), WIDTH)  # it may fill the row
    with pytest.raises(ValueError, match="an example of 300 tokens in rows whose longest have 256"):
        plan_rows(examples, budget._replace(longest=256))


@given(sizes=SIZES)
def test_best_fit_is_best_fit_decreasing(sizes: list[tuple[int, int]]) -> None:
    """Against the definition: look at every open row, take the fullest one that fits."""
    examples = examples_of(sizes)
    left: list[int] = []
    for length in sorted((len(e.tokens) for e in examples), reverse=True):
        fitting = [row for row, space in enumerate(left) if space >= length]
        if fitting:
            left[min(fitting, key=lambda row: left[row])] -= length
        else:
            left.append(128 - length)
    rows = best_fit(examples.lengths, examples.target_counts, Budget(128, 128, 128))
    assert sorted(128 - sum(len(examples[n].tokens) for n in row) for row in rows) == sorted(left)


@pytest.mark.parametrize(("plan", "expected"), [(best_fit, "29e21d14e3215a2e"), (fill_exactly, "1e0a7e1575200ac8")])
def test_plans_stay_what_they_were(plan: Callable[..., Ragged], expected: str) -> None:
    """A run that was begun goes on in its own plan alone: the plan is in the digest of its data."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.7, 2000).astype(np.int64), 8, 512)
    rows = plan(lengths, 1 + (lengths * rng.uniform(0.1, 0.6, 2000)).astype(np.int64), Budget(512, 192, 6))
    assert hashlib.sha256(repr([row.tolist() for row in rows]).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_few(seed: int) -> None:
    """No more than a row over first-fit decreasing, and within 11/9 of the least there can be (Johnson, 1973)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.5, 0.7, 500).astype(int), 8, 512)
    rows = plan_rows(Examples.of(example(int(n), 1) for n in lengths), Budget(512, 512, 512))
    first_fit: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        place = next((i for i, left in enumerate(first_fit) if left >= length), None)
        if place is None:
            first_fit.append(512 - length)
        else:
            first_fit[place] -= length
    assert len(rows) <= len(first_fit) + 1
    assert len(rows) <= 11 / 9 * np.ceil(lengths.sum() / 512) + 1


@given(sizes=SIZES)
def test_chosen_budget_takes_every_example(sizes: list[tuple[int, int]]) -> None:
    examples = examples_of(sizes)
    budget = choose_budget(examples, 128)
    assert budget.tokens == 128 and 1 <= budget.segments <= 128
    assert max(int(e.is_target.sum()) for e in examples) <= budget.targets <= 128
    assert budget.targets % 64 == 0
    assert len(plan_rows(examples, budget)) <= len(examples)


def test_tokens_run_out_before_targets_and_segments() -> None:
    rng = np.random.default_rng(0)
    examples = examples_of([(int(n), int(n) // 3) for n in rng.integers(40, 200, 300)])
    rows = plan_rows(examples, choose_budget(examples, 512))
    assert sum(len(e.tokens) for e in examples) / (512 * len(rows)) > 0.97


@pytest.mark.parametrize(("length", "least"), [(1024, 0.975), (2048, 0.98)])
def test_rows_of_several_examples_are_full(length: int, least: float) -> None:
    """Lengths spread like real dialogues'; best fit alone leaves more."""
    rng = np.random.default_rng(0)
    examples = examples_of([(int(n), int(n) // 2) for n in np.clip(rng.normal(230, 42, 900), 100, 511)])
    budget = choose_budget(examples, length)
    rows = plan_rows(examples, budget)
    assert len(examples.tokens) / (length * len(rows)) > least
    assert len(rows) < len(best_fit(examples.lengths, examples.target_counts, budget))


STARTS = st.sampled_from([(), (0,), (2,), (0, 5), (1, 4, 9)])
SEGMENTS = st.lists(st.tuples(st.integers(12, 20), st.integers(0, 4), STARTS), min_size=0, max_size=5)


@given(rows=st.lists(SEGMENTS, min_size=1, max_size=3), num_tokens=st.sampled_from([1, 3]))
def test_rows_hold_the_batch_contract(rows: list[list[tuple[int, int, tuple[int, ...]]]], num_tokens: int) -> None:
    budget = Budget(128, 32, 6)
    batch = empty_rows(len(rows), budget, WIDTH)
    expected = [reference_row([], [], num_tokens, budget) for _ in rows]
    for number, sizes in enumerate(rows):
        examples = [example(n, t, starts, seed=10 * number + i) for i, (n, t, starts) in enumerate(sizes)]
        vectors = [np.full(WIDTH, 10 * number + i + 0.5, np.float32) for i in range(len(sizes))]
        fill_row(batch, number, examples, vectors, num_tokens)
        expected[number] = reference_row(examples, vectors, num_tokens, budget)
    dtypes = {"user_embeddings": np.float32, "target_weights": np.float32}
    for name, array in batch.items():
        assert array.dtype == dtypes.get(name, np.int32), name
        np.testing.assert_array_equal(array, [row[name] for row in expected], err_msg=name)


def reference_row(examples: list[Example], vectors: list[Any], num_tokens: int, budget: Budget) -> dict[str, Any]:
    """The contract read off column by column: lists that grow, padded at the end."""
    tokens, positions, segments, slots, targets = [], [], [], [], []
    users = []
    for number, (e, vector) in enumerate(zip(examples, vectors, strict=True)):
        users.append(vector if e.slot_starts else np.zeros(WIDTH))
        for position, token in enumerate(e.tokens.tolist()):
            if e.is_target[position]:
                targets.append((len(tokens) - 1, token, 1.0))
            inside = [start for start in e.slot_starts if start <= position < start + num_tokens]
            slots.append(number * num_tokens + position - inside[0] if inside else -1)
            tokens.append(token)
            positions.append(position)
            segments.append(number + 1)
    rest, no_target = budget.tokens - len(tokens), budget.targets - len(targets)
    where, ids, weights = zip(*targets, *[(0, 0, 0.0)] * no_target, strict=True)
    return {
        "tokens": tokens + [0] * rest,
        "positions": positions + [0] * rest,
        "segment_ids": segments + [0] * rest,
        "slots": slots + [-1] * rest,
        "user_embeddings": np.array(users + [np.zeros(WIDTH)] * (budget.segments - len(users))),
        "target_positions": where,
        "target_ids": ids,
        "target_weights": weights,
    }
