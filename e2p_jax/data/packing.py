"""Examples -> rows: a plan made once, and the arrays of one row.

Rows have three budgets: T tokens, M targets, S segments. An example is never torn. The plan is best-fit decreasing
(Johnson, 1973): longest first, each into the fullest row that still takes it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from e2p_jax.data.encode import Example
from e2p_jax.data.examples import Examples


class Budget(NamedTuple):
    """What a row holds; static for a run."""

    tokens: int  # T
    targets: int  # M
    segments: int  # S


def choose_budget(examples: Examples, seq_len: int) -> Budget:
    """M and S for rows of T tokens, large enough that T runs out first.

    M is a tenth more targets than such rows hold on average, S as many segments as the shortest twentieth of the
    examples would fill a row with.
    """
    lengths, targets = examples.lengths, examples.target_counts
    want = 1.1 * seq_len * targets.sum() / lengths.sum()
    most = min(seq_len, -(-max(int(want), targets.max()) // 64) * 64)
    return Budget(seq_len, most, max(1, int(seq_len // np.percentile(lengths, 5))))


def plan_rows(examples: Examples, budget: Budget) -> list[list[int]]:
    """Rows of example numbers, every example in exactly one."""
    lengths, targets = examples.lengths.tolist(), examples.target_counts.tolist()
    rows: list[list[int]] = []
    room: list[int] = []  # targets left in a row
    by_space: list[list[int]] = [[] for _ in range(budget.tokens + 1)]  # open rows by tokens left
    spaces = 0  # bit n is set where by_space[n] is not empty: the fullest fitting row is one shift away
    for number in sorted(range(len(examples)), key=lambda n: -lengths[n]):
        space, row = lengths[number], -1
        while (open_spaces := spaces >> space) and row < 0:
            space += (open_spaces & -open_spaces).bit_length() - 1
            row = next((r for r in reversed(by_space[space]) if room[r] >= targets[number]), -1)
            space += row < 0
        if row < 0:
            row, space = len(rows), budget.tokens
            rows.append([])
            room.append(budget.targets)
        else:
            by_space[space].remove(row)
            if not by_space[space]:
                spaces &= ~(1 << space)
        rows[row].append(number)
        room[row] -= targets[number]
        left = space - lengths[number]
        if left and len(rows[row]) < budget.segments:
            by_space[left].append(row)
            spaces |= 1 << left
    return rows


def empty_rows(count: int, budget: Budget, width: int) -> dict[str, np.ndarray]:
    """A batch of `count` rows of padding; the arrays of the batch contract."""
    t, m, s = budget
    return {
        "tokens": np.zeros((count, t), np.int32),
        "positions": np.zeros((count, t), np.int32),
        "segment_ids": np.zeros((count, t), np.int32),
        "slots": np.full((count, t), -1, np.int32),
        "user_embeddings": np.zeros((count, s, width), np.float32),
        "target_positions": np.zeros((count, m), np.int32),
        "target_ids": np.zeros((count, m), np.int32),
        "target_weights": np.zeros((count, m), np.float32),
    }


def fill_row(
    batch: dict[str, np.ndarray], row: int, examples: Sequence[Example], vectors: Sequence[np.ndarray], num_tokens: int
) -> None:
    """Writes examples, one segment each, into row `row` of `batch`.

    Args:
      batch: of `empty_rows`, written to.
      row: its number.
      examples: that fit the row's budget together.
      vectors: [E] float32 for each example; read only where the example has slots.
      num_tokens: K.
    """
    start = target = 0
    for segment, (example, vector) in enumerate(zip(examples, vectors, strict=True)):
        end = start + len(example.tokens)
        batch["tokens"][row, start:end] = example.tokens
        batch["positions"][row, start:end] = np.arange(end - start)
        batch["segment_ids"][row, start:end] = segment + 1
        if example.slot_start >= 0:
            first = start + example.slot_start
            batch["slots"][row, first : first + num_tokens] = segment * num_tokens + np.arange(num_tokens)
            batch["user_embeddings"][row, segment] = vector
        places = np.flatnonzero(example.is_target)
        last = target + len(places)
        batch["target_positions"][row, target:last] = start + places - 1
        batch["target_ids"][row, target:last] = example.tokens[places]
        batch["target_weights"][row, target:last] = 1.0
        start, target = end, last
