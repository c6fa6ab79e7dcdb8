"""What to know of prepared interactions before trusting a number that they give."""

import collections
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from e2p_jax.datasets.interactions.log import SPLITS, Interactions
from e2p_jax.datasets.interactions.split import Options
from e2p_jax.datasets.records import Record

_ASKED = ("train", "validation", "test")


def notes(interactions: Interactions, options: Options, users: int) -> list[str]:
    """Lines on users without a record, ties in time, and titles that differ in case alone.

    Args:
      users: how many the log has.
    """
    lines = []
    lacking = {name: users - len(np.unique(interactions.of(name).users)) for name in _ASKED}
    if options.split == "time" and any(lacking.values()):
        counts = ", ".join(f"{count} without a {name} record" for name, count in lacking.items())
        lines.append(
            f"of {users} users, {counts}: all that they did lies on one side of a cut; where too few are left, raise "
            "held_out, lower min_history, or prepare interactions/leave_last_out"
        )
    if interactions.times is not None:
        # Rows are in the order of each user's consumption: a tie has its like before it or behind it.
        same = (np.diff(interactions.users) == 0) & (np.diff(interactions.times) == 0)
        asked = np.isin(interactions.splits, [SPLITS.index(name) for name in _ASKED])
        if tied := int((asked & (np.append(False, same) | np.append(same, False))).sum()):
            lines.append(
                f"{tied} of {int(asked.sum())} titles asked for are at the same time as another item of their user: "
                "the order of the file decides; give finer times if there are any"
            )
    folded = collections.Counter(title.casefold() for title in interactions.titles)
    if alike := sum(count for count in folded.values() if count > 1):
        lines.append(f"{alike} titles differ from another in case alone: a tokenizer that lowers case sees one title")
    return lines


def covered(records: Iterable[Record], split: str, targets: Collection[str], lines: list[str]) -> Iterator[Record]:
    """Passes `records` on, and in the end adds a line on how many of their candidates are `targets` of training."""
    counts = np.zeros((2, 2), np.int64)  # true and wrong; trained on and all
    for record in records:
        if record.candidates:
            known = sum(title in targets for title in record.candidates)
            true = record.candidates[0] in targets
            counts += [[true, 1], [known - true, len(record.candidates) - 1]]
        yield record
    if counts.any():
        right, wrong = (f"{asked / max(whole, 1):.0%}" for asked, whole in counts)
        lines.append(f"{split}: {right} of the true and {wrong} of the wrong candidates are asked for in train")
