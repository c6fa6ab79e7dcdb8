"""Interactions with their splits: what a prepared dataset keeps beside its records.

`items.parquet` (`item_id`, `title`; titles are distinct, so that a record's title names its item) and
`interactions.parquet` (`user_id`, `item_id`, `weight`, `time` where there are times, `split`, `fold` where a history is
dealt into parts), in the order of each
user's consumption.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from e2p_jax.errors import UserError

SPLITS = ("history", "train", "validation", "test", "unused")
"""The purposes of an interaction.

history: what the user's vector and context may be made of; train, validation, test: the title that a record asks for;
unused: none of these (a time split asks for one title a user and window; a weight below `min_weight`).
"""
ITEMS, INTERACTIONS = "items.parquet", "interactions.parquet"


@dataclasses.dataclass(frozen=True)
class Interactions:
    """N interactions of U users with I items, grouped by user, each user's in the order of consumption."""

    user_ids: list[str]  # U
    item_ids: list[str]  # I
    titles: list[str]  # I, distinct
    users: np.ndarray  # [N] int32, into user_ids
    items: np.ndarray  # [N] int32, into item_ids
    weights: np.ndarray  # [N] float32
    times: np.ndarray | None  # [N] float64, seconds
    splits: np.ndarray  # [N] int8, into SPLITS
    folds: np.ndarray | None = None  # [N] int8: part of its user's history, -1 for what is none

    def __len__(self) -> int:
        return len(self.users)

    def of(self, *splits: str) -> "Interactions":
        """Those of the named splits; users and items keep their numbers.

        Vectors and baselines that must not see what is asked for take `of("history")`; `of("history", "train")` is
        all that is known before validation.
        """
        rows = np.isin(self.splits, [SPLITS.index(name) for name in splits])
        columns = {name: getattr(self, name) for name in ("users", "items", "weights", "times", "splits", "folds")}
        chosen: dict[str, Any] = {name: None if column is None else column[rows] for name, column in columns.items()}
        return dataclasses.replace(self, **chosen)


def part_id(user: str, fold: int) -> str:
    """The user without a part of the history."""
    return f"{user}#{fold}"


def save_interactions(directory: Path, interactions: Interactions) -> None:
    """Writes the two files into `directory`."""
    items = {"item_id": interactions.item_ids, "title": interactions.titles}
    columns = {
        "user_id": _dictionary(interactions.users, interactions.user_ids),
        "item_id": _dictionary(interactions.items, interactions.item_ids),
        "weight": pa.array(interactions.weights),
        "split": _dictionary(interactions.splits, SPLITS),
    }
    if interactions.times is not None:
        columns["time"] = pa.array(interactions.times)
    if interactions.folds is not None:
        columns["fold"] = pa.array(interactions.folds)
    pq.write_table(pa.table(items), directory / ITEMS)
    pq.write_table(pa.table(columns), directory / INTERACTIONS)


def is_interactions(path: str) -> bool:
    """Tells whether `data.path` is what `e2p prepare interactions` wrote."""
    return (Path(path).expanduser() / INTERACTIONS).is_file()


@functools.lru_cache(maxsize=1)
def load_titles(directory: Path) -> dict[str, str]:
    """The title of every item, by its id.

    Raises:
      UserError: the directory has none.
    """
    try:
        rows = pq.read_table(directory / ITEMS)
        return dict(zip(rows["item_id"].to_pylist(), rows["title"].to_pylist(), strict=True))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{directory / ITEMS}: missing or unreadable ({error}); prepare the data anew") from error


def load_interactions(directory: Path) -> Interactions:
    """Reads what `e2p prepare interactions` left in the directory that it printed.

    Raises:
      UserError: the files are not there, or not such files.
    """
    try:
        items, rows = (pq.read_table(directory / name) for name in (ITEMS, INTERACTIONS))
        item_ids, titles = (items.column(name).to_pylist() for name in ("item_id", "title"))
        users, user_ids = _numbers(rows.column("user_id"))
        places, names = _numbers(rows.column("item_id"))
        order = {item: number for number, item in enumerate(item_ids)}
        splits, split_names = _numbers(rows.column("split"))
        return Interactions(
            user_ids,
            item_ids,
            titles,
            users,
            np.array([order[name] for name in names], np.int32)[places],
            rows.column("weight").to_numpy().astype(np.float32),
            rows.column("time").to_numpy() if "time" in rows.column_names else None,
            np.array([SPLITS.index(name) for name in split_names], np.int8)[splits],
            rows.column("fold").to_numpy() if "fold" in rows.column_names else None,
        )
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(
            f"{directory}: its {ITEMS} and {INTERACTIONS} are missing or unreadable ({error}); "
            "give the directory that `e2p prepare interactions` printed"
        ) from error


def _dictionary(numbers: np.ndarray, names: list[str] | tuple[str, ...]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32)), pa.array(list(names)))


def _numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """[N] int32 into the distinct texts, in order of first appearance."""
    encoded = column.combine_chunks()
    if not isinstance(encoded, pa.DictionaryArray):
        encoded = encoded.dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int32), encoded.dictionary.to_pylist()
