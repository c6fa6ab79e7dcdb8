"""Examples -> rows: a plan made once, and the arrays of one row.

Rows have three budgets: T tokens, M targets, S segments. An example is never torn.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from e2p_jax.data.columns import Ragged
from e2p_jax.data.encode import Example
from e2p_jax.data.examples import Examples

_BLOCK = 1 << 12  # examples that are Python's numbers at once
_WHOLE = 128  # T is a multiple of it, and L
_TRIES = 16  # lengths looked at for each place but the last two of a row


class Budget(NamedTuple):
    """The room in a row; static for a run."""

    tokens: int  # T
    targets: int  # M
    segments: int  # S
    items: int = 0  # N: of the conversation that has most; no budget of a row's
    longest: int = 0  # L, a divisor of T: no example is longer; 0 is T


def choose_budget(examples: Examples, seq_len: int) -> Budget:
    """M and S for rows of T tokens, large enough that T runs out first.

    M is a tenth more targets than such rows hold on average, S as many segments as the shortest twentieth of the
    examples would fill a row with; L is of whole blocks, or T.
    """
    lengths, targets = examples.lengths, examples.target_counts
    want = 1.1 * seq_len * targets.sum() / lengths.sum()
    most = min(seq_len, -(-max(int(want), int(targets.max())) // 64) * 64)
    items = int(examples.item_counts.max())
    segments = max(1, int(seq_len // np.percentile(lengths, 5)))
    return Budget(seq_len, most, segments, items, longest_of(int(lengths.max()), seq_len))


def longest_of(length: int, seq_len: int) -> int:
    """L for rows of T tokens and examples of at most `length`."""
    return next((size for size in range(_WHOLE, seq_len, _WHOLE) if size >= length and not seq_len % size), seq_len)


def plan_rows(examples: Examples, budget: Budget) -> Ragged:
    """Rows of example numbers, every example in exactly one: the shorter of two plans.

    Best fit wastes least where rows hold two or three examples, `fill_exactly` where they hold more.

    Raises:
      ValueError: an example is longer than the budget has them.
    """
    lengths, targets = examples.lengths, examples.target_counts
    if budget.longest and lengths.max() > budget.longest:
        raise ValueError(f"an example of {lengths.max()} tokens in rows whose longest have {budget.longest}")
    return min((plan(lengths, targets, budget) for plan in (best_fit, fill_exactly)), key=len)


def best_fit(lengths: np.ndarray, targets: np.ndarray, budget: Budget) -> Ragged:
    """Best-fit decreasing (Johnson, 1973): longest first, each into the fullest row that still takes it.

    Args:
      lengths: [N] int64.
      targets: [N] int64.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of = array("q")  # of each, in this order
    room, held = array("i"), array("i")  # by row: targets left, examples in it
    by_space = [array("q") for _ in range(budget.tokens + 1)]  # open rows by tokens left
    most_room = [0] * (budget.tokens + 1)  # no open row with as many tokens left has room for more targets
    spaces = 0  # bit n is set where by_space[n] is not empty: the fullest fitting row is one shift away
    for length, wanted in _pairs(lengths, targets, order):
        space, place = length, -1
        while (open_spaces := spaces >> space) and place < 0:
            space += (open_spaces & -open_spaces).bit_length() - 1
            rows = by_space[space]
            if wanted <= most_room[space]:
                place = next((p for p in range(len(rows) - 1, -1, -1) if room[rows[p]] >= wanted), -1)
                if place < 0:
                    most_room[space] = max(room[row] for row in rows)
            space += place < 0
        if place < 0:
            row, space = len(room), budget.tokens
            room.append(budget.targets)
            held.append(0)
        else:
            row = rows.pop(place)
            if not rows:
                spaces &= ~(1 << space)
                most_room[space] = 0
        row_of.append(row)
        room[row] -= wanted
        held[row] += 1
        left = space - length
        if left and held[row] < budget.segments:
            by_space[left].append(row)
            most_room[left] = max(most_room[left], room[row])
            spaces |= 1 << left
    by_row = np.argsort(np.frombuffer(row_of, np.int64), kind="stable")
    return Ragged(order[by_row], np.cumsum(held, dtype=np.int64))


def fill_exactly(lengths: np.ndarray, targets: np.ndarray, budget: Budget) -> Ragged:
    """Row by row: the longest examples left, then the one, two or three that leave least of the row, as minimum bin
    slack does (Gupta & Ho, 1999).

    Args:
      lengths: [N] int64.
      targets: [N] int64.
    """
    stock = _Stock(lengths, targets, budget.tokens)
    taken, ends = array("q"), array("q")
    mean = lengths.sum() / max(len(lengths), 1)
    while stock.present:
        length = stock.longest(budget.tokens)
        row = [stock.take(length)]
        space, room = budget.tokens - length, budget.targets - stock.targets[row[0]]
        while len(row) < budget.segments and 0 < stock.shortest() <= space:
            most = min(3, budget.segments - len(row))
            chosen = stock.filling(space, room, most) if space <= 3 * mean else (stock.longest(space),)
            if not chosen or stock.targets_of(chosen) > room:
                break
            for length in chosen:
                row.append(stock.take(length))
                space, room = space - length, room - stock.targets[row[-1]]
        taken.extend(row)
        ends.append(len(taken))
    return Ragged(stock.order[np.frombuffer(taken, np.int64)], np.array(ends, np.int64))


def _pairs(lengths: np.ndarray, targets: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, int]]:
    """Length and targets of each, as Python's numbers, block by block."""
    for first in range(0, len(order), _BLOCK):
        block = order[first : first + _BLOCK]
        yield from zip(lengths[block].tolist(), targets[block].tolist(), strict=True)


class _Stock:
    """Examples left to place, by length; sets of lengths are the bits of whole numbers."""

    def __init__(self, lengths: np.ndarray, targets: np.ndarray, longest: int):
        self.order = np.lexsort((-targets, lengths))  # [N] int64, example numbers: by length, fewest targets last
        self.targets = array("i", targets[self.order].astype(np.intc).tobytes())
        counts = np.bincount(lengths, minlength=longest + 1)
        self._left: list[int] = counts.tolist()  # of each length
        self._end: list[int] = counts.cumsum().tolist()  # where what is left of each ends in the order
        there = np.flatnonzero(counts).tolist()
        self._top = longest
        self.present = sum(1 << length for length in there)
        self._mirrored = sum(1 << (longest - length) for length in there)

    def take(self, length: int) -> int:
        """The place in the order of the example of this length with the fewest targets."""
        self._left[length] -= 1
        self._end[length] -= 1
        if not self._left[length]:
            self.present ^= 1 << length
            self._mirrored ^= 1 << (self._top - length)
        return self._end[length]

    def targets_of(self, chosen: tuple[int, ...]) -> int:
        """Targets of the examples that `take` would give for these lengths."""
        return sum(
            sum(self.targets[self._end[length] - chosen.count(length) : self._end[length]]) for length in set(chosen)
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
            if rest and all(self._left[each] >= chosen.count(each) for each in chosen):
                return chosen
        return None


def empty_rows(count: int, budget: Budget, width: int) -> dict[str, np.ndarray]:
    """A batch of `count` rows of padding; the arrays of the batch contract."""
    t, m, s, n, longest = budget
    items = {"item_positions": np.zeros((count, s), np.int32), "item_ids": np.full((count, s, n), -1, np.int32)}
    return {
        "tokens": np.zeros((count, t), np.int32),
        "positions": np.zeros((count, t), np.int32),
        "segment_ids": np.zeros((count, t), np.int32),
        "slots": np.full((count, t), -1, np.int32),
        "user_embeddings": np.zeros((count, s, width), np.float32),
        "target_positions": np.zeros((count, m), np.int32),
        "target_ids": np.zeros((count, m), np.int32),
        "target_weights": np.zeros((count, m), np.float32),
        **(items if n else {}),
        **({"longest": np.zeros((count, longest), np.int8)} if 0 < longest < t else {}),
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
        if len(example.slot_starts):
            slots = start + example.slot_places(num_tokens)
            batch["slots"][row, slots] = segment * num_tokens + np.arange(num_tokens)[None]
            batch["user_embeddings"][row, segment] = vector
        places = np.flatnonzero(example.is_target)
        last = target + len(places)
        batch["target_positions"][row, target:last] = start + places - 1
        batch["target_ids"][row, target:last] = example.tokens[places]
        batch["target_weights"][row, target:last] = 1.0
        if "item_ids" in batch:
            batch["item_positions"][row, segment] = start + example.answer
            batch["item_ids"][row, segment, : len(example.items)] = example.items
            if example.item_slot >= 0:
                behind = num_tokens * batch["user_embeddings"].shape[1]
                batch["slots"][row, start + example.item_slot] = behind + segment
        start, target = end, last
