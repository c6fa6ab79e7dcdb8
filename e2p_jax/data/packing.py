"""Examples -> rows: a plan made once, and the arrays of one row.

Rows have three budgets: T tokens, M targets, S segments. An example is never torn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from e2p_jax.data.encode import Example
from e2p_jax.data.examples import Examples

_TRIES = 16  # lengths looked at for each place but the last two of a row


class Budget(NamedTuple):
    """The room in a row; static for a run."""

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
    """Rows of example numbers, every example in exactly one: the shorter of two plans.

    Best fit wastes least where rows hold two or three examples, `fill_exactly` where they hold more.
    """
    lengths, targets = examples.lengths.tolist(), examples.target_counts.tolist()
    return min((plan(lengths, targets, budget) for plan in (best_fit, fill_exactly)), key=len)


def best_fit(lengths: list[int], targets: list[int], budget: Budget) -> list[list[int]]:
    """Best-fit decreasing (Johnson, 1973): longest first, each into the fullest row that still takes it."""
    rows: list[list[int]] = []
    room: list[int] = []  # targets left in a row
    by_space: list[list[int]] = [[] for _ in range(budget.tokens + 1)]  # open rows by tokens left
    spaces = 0  # bit n is set where by_space[n] is not empty: the fullest fitting row is one shift away
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
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


def fill_exactly(lengths: list[int], targets: list[int], budget: Budget) -> list[list[int]]:
    """Row by row: the longest examples left, then the one, two or three that leave least of the row, as minimum bin
    slack does (Gupta & Ho, 1999).
    """
    stock = _Stock(lengths, targets, budget.tokens)
    rows: list[list[int]] = []
    mean = sum(lengths) / max(len(lengths), 1)
    while stock.present:
        row, space, room = [stock.take(stock.longest(budget.tokens))], budget.tokens, budget.targets
        space, room = space - lengths[row[0]], room - targets[row[0]]
        while len(row) < budget.segments and 0 < stock.shortest() <= space:
            most = min(3, budget.segments - len(row))
            chosen = stock.filling(space, room, most) if space <= 3 * mean else (stock.longest(space),)
            if not chosen or stock.targets_of(chosen) > room:
                break
            for length in chosen:
                row.append(stock.take(length))
                space, room = space - length, room - targets[row[-1]]
        rows.append(row)
    return rows


class _Stock:
    """Examples left to place, by length; sets of lengths are the bits of whole numbers."""

    def __init__(self, lengths: list[int], targets: list[int], longest: int):
        self.targets, self._top = targets, longest
        self._by_length: list[list[int]] = [[] for _ in range(longest + 1)]
        for number in sorted(range(len(lengths)), key=lambda n: -targets[n]):
            self._by_length[lengths[number]].append(number)
        self.present = sum(1 << length for length in set(lengths))
        self._mirrored = sum(1 << (longest - length) for length in set(lengths))

    def take(self, length: int) -> int:
        """The example of this length with the fewest targets."""
        number = self._by_length[length].pop()
        if not self._by_length[length]:
            self.present ^= 1 << length
            self._mirrored ^= 1 << (self._top - length)
        return number

    def targets_of(self, chosen: tuple[int, ...]) -> int:
        """Targets of the examples that `take` would give for these lengths."""
        return sum(
            self.targets[number]
            for length in set(chosen)
            for number in self._by_length[length][-chosen.count(length) :]
        )

    def longest(self, space: int) -> int:
        return (self.present & ((1 << (space + 1)) - 1)).bit_length() - 1

    def shortest(self) -> int:
        return (self.present & -self.present).bit_length() - 1

    def filling(self, space: int, room: int, most: int) -> tuple[int, ...] | None:
        """Up to `most` lengths that leave as little of `space` as can be, and whose targets fit in `room`."""
        for total in range(space, self.shortest() - 1, -1):
            for count in range(1, most + 1):
                chosen = self._summing(total, count)
                if chosen and self.targets_of(chosen) <= room:
                    return chosen
        return None

    def _summing(self, total: int, count: int) -> tuple[int, ...] | None:
        """`count` lengths that sum to `total`, if a short search finds them; all examples that they name are there."""
        if count == 1:
            return (total,) if total > 0 and self.present >> total & 1 else None
        tried = self.present & ((1 << max(total, 0)) - 1)
        if count == 2:  # those whose complement is there, too
            tried &= self._mirrored >> (self._top - total)
        for _ in range(_TRIES):
            length = tried.bit_length() - 1
            if length * count < total:
                return None
            tried ^= 1 << length
            rest = self._summing(total - length, count - 1)
            chosen = (length, *(rest or ()))
            if rest and all(len(self._by_length[each]) >= chosen.count(each) for each in chosen):
                return chosen
        return None


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
