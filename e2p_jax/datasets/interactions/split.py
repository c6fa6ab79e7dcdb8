"""A log of interactions -> the same with what each is for -> records, each of which asks for the title of one item."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from e2p_jax.datasets.interactions.layouts import Log
from e2p_jax.datasets.interactions.log import SPLITS, Interactions, part_id
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError

HISTORY, TRAIN, VALIDATION, TEST, UNUSED = range(len(SPLITS))


@dataclasses.dataclass(frozen=True)
class Options:
    """The way in which interactions become records."""

    split: Literal["leave_last_out", "time"] = "leave_last_out"
    """time: cuts in time, the same for all users; leave_last_out: a user's last item is `test`, the one before
    `validation`, those before them `train`, so that others' histories tell of days after a user's test. In a log
    without times, the seed orders a user's items."""
    candidates: Literal["uniform", "popularity"] = "uniform"
    """What the wrong candidates are drawn from: all items alike, or as often as the known interactions have them."""
    num_candidates: int = 100
    """Titles to rank, the true one included; no wrong one is an item that the user has anywhere in the log."""
    seed: int = 0
    train_targets: int = 5
    """Titles asked for in training, per user; they are no part of the user's history."""
    held_out_targets: int = 1
    """Of a time split: titles asked for in validation and in test, per user and window, each by a record of its own."""
    folds: int = 0
    """Into so many parts a user's history is dealt, by the seed; each part is asked for in training by one record, of
    the user `USER#PART`, to whom `e2p embed` gives a vector and the record a context without that part. 0: none."""
    min_history: int = 3
    """Users with fewer items for their vector to stand for are left out."""
    min_weight: float = 0.0
    """Interactions of less weight are neither history nor asked for, such as low ratings."""
    held_out: float = 0.1
    """Of a time split: the share of the interactions in each of the windows train, validation and test."""
    new_items: float = 0.0
    """Of a time split: the share of all items, drawn by the seed, that nobody is known to have before the window test:
    what comes out after training, as episodes do. What users had of them earlier is unused."""
    context: int = 50
    """Titles of the history that stand in a record: the latest, or the heaviest in a log without times."""
    question: str = "What do I want next?"
    """The user turn; the title is the answer."""

    def validate(self) -> None:
        """
        Raises:
          UserError: naming the option that is out of range.
        """
        checks = [
            (self.num_candidates >= 2, "num_candidates must be 2 or more"),
            (self.train_targets >= 1, "train_targets must be 1 or more"),
            (self.held_out_targets >= 1, "held_out_targets must be 1 or more"),
            (self.folds == 0 or 1 < self.folds < 100, "folds must be 0, or from 2 to 99"),
            (self.folds == 0 or self.min_history >= 2, "folds needs a min_history of 2 or more"),
            (self.min_history >= 1, "min_history must be 1 or more"),
            (0 < self.held_out < 0.33, "held_out must be above 0 and below 0.33"),
            (0 <= self.new_items < 1, "new_items must be 0 or more and below 1"),
            (self.new_items == 0 or self.split == "time", "new_items needs a time split"),
            (self.context >= 1, "context must be 1 or more"),
            (bool(self.question.strip()), "question must not be empty"),
        ]
        for holds, message in checks:
            if not holds:
                raise UserError(f"interactions: option {message}")


def split(log: Log, options: Options) -> tuple[Interactions, dict[str, int]]:
    """Orders each user's items and says what each is for.

    A user's rows of one item are one interaction, at the time of the first; its weight is the sum over the rows up to
    the end of the user's history (all rows, in a log without times), so that no weight tells of the future. What is
    below `min_weight` alone stays, unused, where the catalogue has the item.

    Returns:
      The interactions, without what was left out, and how much was left out for which reason.

    Raises:
      UserError: a time split without times, or nobody with enough interactions.
    """
    if options.split == "time" and log.times is None:
        raise UserError("interactions/time: needs a column of times; prepare interactions/leave_last_out")
    titled = np.array([bool(title) for title in log.titles])[log.items]
    heavy = log.weights >= options.min_weight
    rows = np.flatnonzero(titled)
    if not (titled & heavy).any():
        raise UserError(
            f"interactions: no interaction has a title and a weight of {options.min_weight} or more; "
            "the items of both files must have the same ids"
        )
    users, items, weights, heavy = log.users[rows], log.items[rows], log.weights[rows].astype(np.float64), heavy[rows]
    pairs = users.astype(np.int64) * len(log.item_ids) + items
    if log.times is None:
        distinct, number = np.unique(pairs, return_inverse=True)
        times = np.random.default_rng(options.seed).random(len(distinct))[number]
    else:
        times = log.times[rows]

    order = np.lexsort((np.arange(len(rows)), times, users))
    users, items, weights, times, heavy = users[order], items[order], weights[order], times[order], heavy[order]
    # A pair is at its first row of enough weight; one that has none stays as unused: no wrong candidate for its user.
    _, pair = np.unique(pairs[order], return_inverse=True)
    enough = np.bincount(pair, weights=heavy)[pair] > 0
    counts = heavy | ~enough
    is_first = np.zeros(len(rows), bool)
    is_first[np.flatnonzero(counts)[np.unique(pair[counts], return_index=True)[1]]] = True

    splits = np.full(len(rows), UNUSED, np.int8)
    assign = _leave_last_out if options.split == "leave_last_out" else _by_time
    asked = is_first & enough
    splits[asked] = assign(users[asked], times[asked], options)
    is_new = np.random.default_rng([options.seed, 2]).random(len(log.item_ids)) < options.new_items
    splits[is_new[items] & (splits != TEST)] = UNUSED
    history = np.bincount(users[splits == HISTORY], minlength=len(log.user_ids))
    stays = (history >= options.min_history)[users]
    if not stays.any():
        raise UserError(
            f"interactions: no user has {options.min_history} items before those that are asked for; "
            "lower min_history or give more interactions"
        )
    end = np.full(len(log.user_ids), -np.inf)
    np.maximum.at(end, users[splits == HISTORY], times[splits == HISTORY])
    counts &= is_first | (times <= end[users]) if log.times is not None else True
    total = np.bincount(pair, weights=np.where(counts, weights, 0.0))
    catalogue = np.zeros(len(log.item_ids), bool)
    catalogue[items[asked & stays]] = True
    kept = np.flatnonzero(is_first & stays & catalogue[items])
    counted = {
        "rows without a title": int((~titled).sum()),
        "rows below min_weight": int((~heavy).sum()),
        "users with too short a history": len(np.unique(log.users)) - len(np.unique(users[kept])),
    }
    final = None if log.times is None else times[kept]
    made = _compact(log, users[kept], items[kept], total[pair[kept]], final, splits[kept])
    return dataclasses.replace(made, folds=_folds(made, options)), counted


def _folds(interactions: Interactions, options: Options) -> np.ndarray | None:
    """[N] int8: the part of its user's history that each is in, in size one more or less; -1 where it is no history."""
    if not options.folds:
        return None
    if taken := [user for user in interactions.user_ids if "#" in user]:
        raise UserError(f"interactions: user {taken[0]!r}: with folds no id may hold a #; rename that user")
    folds = np.full(len(interactions), -1, np.int8)
    rows = np.flatnonzero(interactions.splits == HISTORY)
    order = np.lexsort((np.random.default_rng([options.seed, 1]).random(len(rows)), interactions.users[rows]))
    place, _ = _ranks(interactions.users[rows])
    folds[rows[order]] = place % options.folds
    return folds


def _ranks(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows grouped by user: each row's place in its group from the front, and from the end."""
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    sizes = np.diff(np.append(starts, len(users)))
    place = np.arange(len(users)) - np.repeat(starts, sizes)
    return place, np.repeat(sizes, sizes) - 1 - place


def _leave_last_out(users: np.ndarray, times: np.ndarray, options: Options) -> np.ndarray:
    """[n] int8: from a user's end: test, validation, train; training takes nothing off a history of `min_history`."""
    place, rank = _ranks(users)
    splits = np.full(len(users), HISTORY, np.int8)
    splits[(rank >= 2) & (rank < 2 + options.train_targets) & (place >= options.min_history)] = TRAIN
    splits[rank == 1], splits[rank == 0] = VALIDATION, TEST
    return splits


def _by_time(users: np.ndarray, times: np.ndarray, options: Options) -> np.ndarray:
    """[n] int8: a user's first items in the last two windows, and the first `train_targets` in the one before."""
    cuts = np.quantile(times, [1 - 3 * options.held_out, 1 - 2 * options.held_out, 1 - options.held_out])
    windows = np.searchsorted(cuts, times, side="right")  # 0 history, 1 train, 2 validation, 3 test
    place, _ = _ranks(users.astype(np.int64) * 4 + windows)
    asked = np.array([len(users), options.train_targets, *[options.held_out_targets] * 2])[windows]
    return np.where(place < asked, windows, UNUSED).astype(np.int8)


def _compact(
    log: Log, users: np.ndarray, items: np.ndarray, weights: np.ndarray, times: np.ndarray | None, splits: np.ndarray
) -> Interactions:
    """With only the users and items that still occur, and with a title of its own for every item."""
    user_numbers, users = np.unique(users, return_inverse=True)
    item_numbers, items = np.unique(items, return_inverse=True)
    item_ids = [log.item_ids[number] for number in item_numbers]
    titles = [log.titles[number] for number in item_numbers]
    return Interactions(
        [log.user_ids[number] for number in user_numbers],
        item_ids,
        _distinct(titles, item_ids),
        users.astype(np.int32),
        items.astype(np.int32),
        weights.astype(np.float32),
        times,
        splits,
    )


def _distinct(titles: list[str], item_ids: list[str]) -> list[str]:
    """Items that share a title get their id behind it."""
    seen: dict[str, int] = {}
    for title in titles:
        seen[title] = seen.get(title, 0) + 1
    named = [title if seen[title] == 1 else f"{title} [{item}]" for title, item in zip(titles, item_ids, strict=True)]
    if len(set(named)) != len(named):
        raise UserError("interactions: two items share a title that ends in the id of one of them; rename one")
    return named


def records(interactions: Interactions, options: Options, split: str) -> Iterator[Record]:
    """Yields the records of `train`, `validation` or `test`; those of the last two have candidates."""
    starts = np.searchsorted(interactions.users, np.arange(len(interactions.user_ids) + 1))
    draw = _Sampler(interactions, options)
    for row in np.flatnonzero(interactions.splits == SPLITS.index(split)):
        user, item = int(interactions.users[row]), int(interactions.items[row])
        mine = slice(starts[user], starts[user + 1])
        candidates = () if split == "train" else (item, *draw(user, item, interactions.items[mine]))
        title = interactions.titles[item]
        yield Record(
            interactions.user_ids[user],
            _context(interactions, mine, options.context),
            ({"role": "user", "content": options.question}, {"role": "assistant", "content": title}),
            tuple(interactions.titles[candidate] for candidate in candidates),
            source=f"user {interactions.user_ids[user]!r}, item {interactions.item_ids[item]!r}",
            items=(interactions.item_ids[item],),
        )
    if split == "train" and interactions.folds is not None:
        yield from _parts(interactions, options, starts)


def _parts(interactions: Interactions, options: Options, starts: np.ndarray) -> Iterator[Record]:
    """Records that ask for a part of a history each; the title is that of its last item."""
    assert interactions.folds is not None
    for user, first, last in zip(interactions.user_ids, starts, starts[1:], strict=False):
        mine = slice(first, last)
        for fold in range(options.folds):
            asked = interactions.items[mine][interactions.folds[mine] == fold]
            if not len(asked):  # fewer items than parts
                continue
            asked = np.roll(asked, 1)  # the last is the one that the title is of
            yield Record(
                part_id(user, fold),
                _context(interactions, mine, options.context, fold),
                (
                    {"role": "user", "content": options.question},
                    {"role": "assistant", "content": interactions.titles[asked[0]]},
                ),
                source=f"user {user!r}, part {fold} of the history",
                items=tuple(interactions.item_ids[item] for item in asked),
            )


def _context(interactions: Interactions, mine: slice, length: int, but: int = -1) -> tuple[str, ...]:
    """Titles of a user's history but for one part: the last ones, or in a log without times the heaviest, from heavy to
    light.
    """
    is_history = interactions.splits[mine] == SPLITS.index("history")
    if interactions.folds is not None:
        is_history &= interactions.folds[mine] != but
    history = np.flatnonzero(is_history)
    items = interactions.items[mine][history]
    if interactions.times is None:
        items = items[np.argsort(-interactions.weights[mine][history], kind="stable")][:length]
    return tuple(interactions.titles[item] for item in items[-length:])


class _Sampler:
    """Draws wrong candidates without replacement, by the rule and seed of the options."""

    def __init__(self, interactions: Interactions, options: Options) -> None:
        size = len(interactions.item_ids)
        if options.candidates == "popularity":
            self.share = np.bincount(interactions.of("history", "train").items, minlength=size)
        else:
            self.share = np.ones(size, np.int64)
        self.cumulative = np.cumsum(self.share)
        self.count, self.seed = options.num_candidates - 1, options.seed

    def __call__(self, user: int, item: int, mine: np.ndarray) -> np.ndarray:
        """Item numbers that are not in `mine`: fewer than asked for where the catalogue has no more."""
        count = min(self.count, int(np.count_nonzero(self.share) - np.count_nonzero(self.share[mine])))
        rng = np.random.default_rng([self.seed, user, item])  # the same whatever was drawn before
        chosen, size = np.zeros(0, np.int64), 2 * count
        while len(chosen) < count:
            drawn = np.searchsorted(self.cumulative[:-1], rng.integers(self.cumulative[-1], size=size), side="right")
            chosen = np.concatenate([chosen, drawn[~np.isin(drawn, mine)]])
            chosen = chosen[np.sort(np.unique(chosen, return_index=True)[1])]
            size *= 2
        return chosen[:count]
