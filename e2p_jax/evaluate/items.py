"""Ranking by the head over the catalogue: the item that a record names among its candidates, and among all items.

Among all, what the user is known to have had is left out. An item that the catalogue lacks comes last.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError, shown
from e2p_jax.evaluate.rank import known_interactions, rank_statistics, ranks, recommender_ranks
from e2p_jax.vectors.catalogue import Catalogue
from e2p_jax.vectors.table import UserTable


class Question:
    """Records, and for each the items to be ranked, the true one first."""

    def __init__(self, path: str, catalogue: Catalogue, records: Sequence[Record]):
        """
        Args:
          path: `data.path`; where `e2p prepare interactions` wrote it, candidates are titles, else ids.
          records: that name items; the first is the true one.

        Raises:
          UserError: a candidate is no item.
        """
        self.path, self.records, known = path, records, known_interactions(path)
        self.is_log = known is not None
        self.ids = list(catalogue.table.ids) if known is None else known.item_ids
        self.places = catalogue.rows(self.ids)  # in the catalogue
        number = {item: n for n, item in enumerate(self.ids)}
        named = number if known is None else {title: n for n, title in enumerate(known.titles)}
        users = {} if known is None else {user: n for n, user in enumerate(known.user_ids)}

        def numbers(texts: Sequence[str], record: Record, of: Mapping[str, int]) -> np.ndarray:
            if absent := [text for text in texts if text not in of]:
                raise UserError(f"{record.source}: {shown(absent[0])} is no item of {path}")
            return np.array([of[text] for text in texts])

        self.asked: dict[str, list[np.ndarray]] = {"all": []}  # by what measures' names begin with
        for record in records:
            true = numbers(record.items[:1], record, number)
            had = known.items[known.users == users[record.user_id]] if known and record.user_id in users else true
            self.asked["all"].append(np.append(true, np.setdiff1d(np.arange(len(self.ids)), np.append(had, true))))
        if all(record.candidates for record in records):
            self.asked["item"] = [numbers(record.candidates, record, named) for record in records]

    def statistics(self, queries: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Of the ranking measures, by name, [N, 2] each.

        Args:
          queries: [N, R].
          rows: [I, R], of the catalogue.
        """
        of_items = np.where(self.places[:, None] >= 0, rows[self.places], np.nan)
        found: dict[str, np.ndarray] = {}
        for among, asked in self.asked.items():
            scores = [of_items[items] @ query for items, query in zip(asked, queries, strict=True)]
            worst = [np.where(np.isnan(each), np.inf, -each) for each in scores]
            widest = max(map(len, worst))
            padded = np.stack([np.pad(each, (0, widest - len(each)), constant_values=np.nan) for each in worst])
            found |= {f"{among}_{name}": values for name, values in rank_statistics(ranks(padded)).items()}
        return found

    def recommenders(self, table: UserTable | None) -> dict[str, dict[str, np.ndarray]]:
        """The same of what ranks without a language model, by its name; nothing where the data is no log."""
        out: dict[str, dict[str, np.ndarray]] = {}
        for among, asked in self.asked.items() if self.is_log else ():
            for name, rank in recommender_ranks(self.path, self.records, table, asked).items():
                measured = rank_statistics(rank).items()
                out.setdefault(name, {}).update({f"{among}_{measure}": values for measure, values in measured})
        return out
