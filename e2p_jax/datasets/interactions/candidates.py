"""Interactions -> records: each asks for the title of one item, among others that the user never had."""

from collections.abc import Iterator

import numpy as np

from e2p_jax.datasets.interactions.log import SPLITS, Interactions
from e2p_jax.datasets.interactions.split import Options
from e2p_jax.datasets.records import Record


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
        )


def _context(interactions: Interactions, mine: slice, length: int) -> tuple[str, ...]:
    """Titles of a user's history: the last ones, or in a log without times the heaviest, from heavy to light."""
    history = np.flatnonzero(interactions.splits[mine] == SPLITS.index("history"))
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
