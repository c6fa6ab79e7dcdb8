"""Ranking the items of a catalogue: by likelihood, by the head over items, and without a language model.

The item that a record asks for stands among its candidates, and among all items but those that the user is known to
have had. An item without a score comes last.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from e2p_jax.datasets.interactions.log import Interactions, is_interactions, load_interactions
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError, shown
from e2p_jax.evaluate.rank import rank_statistics, ranks
from e2p_jax.vectors.catalogue import Catalogue
from e2p_jax.vectors.table import UserTable

KNOWN = ("history", "train")  # what a run has seen of a user when it is asked
FIRST = 10  # places of a list that are recommended
ALL = "all_"  # what names of measures among all items begin with
Way = Callable[[str], np.ndarray]  # a user's id -> [I] scores of a log's items


class Question:
    """Records, and for each the items to be ranked, the true one first."""

    def __init__(self, path: str, records: Sequence[Record], catalogue: Catalogue | None = None):
        """
        Args:
          path: `data.path`; where `e2p prepare interactions` wrote it, candidates are titles, else ids.
          records: whose candidates, or the first of the items that they name, the true one is.
          catalogue: of the items; may be absent where there is a log.

        Raises:
          UserError: a candidate is no item.
        """
        self.known = load_interactions(Path(path).expanduser()).of(*KNOWN) if is_interactions(path) else None
        known, self.users, self.catalogue = self.known, [record.user_id for record in records], catalogue
        assert known is not None or catalogue is not None
        self.ids = known.item_ids if known is not None else list(catalogue.table.ids) if catalogue else []
        number = {item: n for n, item in enumerate(self.ids)}
        named = number if known is None else {title: n for n, title in enumerate(known.titles)}
        self.had: dict[str, np.ndarray] = {}  # items that users are known to have had
        if known is not None:
            self.popularity = np.bincount(known.items, minlength=len(self.ids)).astype(float)
            ends = np.searchsorted(known.users, np.arange(len(known.user_ids) + 1))  # grouped by user
            self.had = {u: known.items[a:b] for u, a, b in zip(known.user_ids, ends, ends[1:], strict=False)}

        def numbers(texts: Sequence[str], record: Record, of: Mapping[str, int]) -> np.ndarray:
            if absent := [text for text in texts if text not in of]:
                raise UserError(f"{record.source}: {shown(absent[0])} is no item of {path}")
            return np.array([of[text] for text in texts], int)

        # What measures' names begin with says among what: candidates, or all items.
        self.candidates = [numbers(record.candidates, record, named) for record in records]
        self.true = [numbers(record.items[:1], record, number) for record in records]
        self.among = [among for among, asked in (("", self.candidates), (ALL, self.true)) if all(map(len, asked))]

    def asked(self, among: str, record: int) -> np.ndarray:
        """Numbers of the items that are ranked for a record, the true one first: candidates, or all but the known."""
        if not among:
            return self.candidates[record]
        others, true = np.ones(len(self.ids), bool), self.true[record]
        others[self.had.get(self.users[record], true)] = others[true] = False
        return np.append(true, np.flatnonzero(others))

    def measure(self, among: str, scores: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Statistics of the ranking measures and of what stands in the first places, by name, [N, 2] each.

        `popularity@10`: how many users are known to have had an item there, on average, over how many the true one.
        `coverage@10`: the share of the catalogue that stands there in some list; an item counts once, shared by the
        lists that it stands in. `cold_...`: of records whose true item nobody is known to have had; `cold_own_...`: its
        place among all such items alone. All but the second need a log.

        Args:
          among: one of `among`.
          scores: N arrays, of what `asked` has of each record; higher is better, NaN comes last.
        """
        rank, own_rank, first, true = [], [], [], []
        for record, given in enumerate(scores):
            items, worst = self.asked(among, record), np.where(np.isnan(given), np.inf, -given)
            rank.append(ranks(worst[None])[0])
            if self.known is not None and self.popularity[items[0]] == 0:
                own_rank.append(ranks(worst[None, self.popularity[items] == 0])[0])
            else:
                own_rank.append(0)
            last = np.partition(worst, FIRST - 1)[FIRST - 1] if len(worst) > FIRST else np.inf
            near = np.flatnonzero(worst <= last)
            first.append(items[near[np.lexsort((items[near], worst[near]))[:FIRST]]])
            true.append(items[0])
        found = rank_statistics(np.array(rank))
        times = np.bincount(np.concatenate(first), minlength=len(self.ids))
        shares = np.array([np.sum(1 / times[items]) for items in first])
        found["coverage@10"] = np.stack([shares, np.full(len(first), len(self.ids) / len(first))], axis=1)
        if self.known is not None:
            means = [self.popularity[items].mean() for items in first]
            found["popularity@10"] = np.stack([means, self.popularity[true]], axis=1)
            if (cold := self.popularity[true] == 0).any():
                among_cold = rank_statistics(np.array(own_rank))
                for name in ("hits@10", "mrr"):
                    found |= {f"cold_{name}": found[name] * cold[:, None], f"cold_own_{name}": among_cold[name]}
        return {among + name: values for name, values in found.items()}

    def of_head(self, queries: np.ndarray, rows: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
        """What the head over items ranks: candidates, as `item_...`, and all items.

        Args:
          queries: [N, R].
          rows: [C, R], of the catalogue.
          places: [I] where the items are in the catalogue, -1 for one that is not there.
        """
        of_items = np.where(places[:, None] >= 0, rows[places], np.nan)
        found: dict[str, np.ndarray] = {}
        for among in self.among:
            measured = self.measure(among, ((of_items @ q)[self.asked(among, n)] for n, q in enumerate(queries)))
            found |= {name if among else f"item_{name}": values for name, values in measured.items()}
        return found

    def recommenders(self, table: UserTable | None) -> dict[str, dict[str, np.ndarray]]:
        """What ranks the items of a log without a language model, by its name.

        popularity: how many users have the item. item-kNN: cosines of the item's users to those of each of the user's
        items, summed (Sarwar et al., 2001). vectors: cosine of the user's vector to the mean vector of the item's
        users, all less the mean of all. vectors (dot product): the user's vector times the item's factor, which keeps
        the norm, and popularity with it; the factors are those that fit who has what best, by least squares. Both are
        absent without a table. item vectors: cosine of the catalogue's vector of the item to the mean of those of the
        user's items, each in units of its spread; absent without a catalogue.

        Args:
          table: of the users' vectors.
        """
        assert self.known is not None
        ways: dict[str, Way] = {"popularity": lambda user: self.popularity, "item-kNN": neighbours(self.known)}
        ways |= {} if table is None else _of_vectors(self.known, table)
        ways |= {} if self.catalogue is None else {"item vectors": self._of_items(self.catalogue)}
        out: dict[str, dict[str, np.ndarray]] = {name: {} for name in ways}
        for among in self.among:
            for name, way in ways.items():
                scores = (way(user)[self.asked(among, n)] for n, user in enumerate(self.users))
                out[name] |= self.measure(among, scores)
        return out

    def _of_items(self, catalogue: Catalogue) -> Way:
        places, nothing = catalogue.rows(self.ids), np.zeros(0, int)
        given = np.where(places[:, None] >= 0, catalogue.given()[places], 0.0).astype(np.float64)
        unit = given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-12)
        absent = np.where(places < 0, np.nan, 0.0)  # last of all
        return lambda user: unit @ given[self.had.get(user, nothing)].sum(axis=0) + absent


def named_titles(path: str, replies: Sequence[str], records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Statistics of replies, [N, 2] each: is one a title of the log, and one that its user has there, before or after
    the cuts? Case and punctuation do not count.
    """

    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.casefold()))

    log = load_interactions(Path(path).expanduser())
    titles = list(map(plain, log.titles))
    every, own = set(titles), {(log.user_ids[u], titles[i]) for u, i in zip(log.users, log.items, strict=True)}
    said = [(record.user_id, plain(reply)) for record, reply in zip(records, replies, strict=True)]
    found = {"title": [title in every for _, title in said], "own_title": [each in own for each in said]}
    return {name: np.stack([values, np.ones(len(said))], axis=1) for name, values in found.items()}


def neighbours(known: Interactions) -> Way:
    """Item-kNN; zeros for a user of whom nothing is known."""
    import scipy.sparse

    shape = (len(known.user_ids), len(known.titles))
    ones = np.ones(len(known))
    has = scipy.sparse.csr_matrix((ones, (known.users, known.items)), shape).sign()
    norm = np.sqrt(np.maximum(has.sum(axis=0), 1)).A1
    unit = (has @ scipy.sparse.diags(1 / norm)).tocsc()  # columns of length 1
    row = {user: place for place, user in enumerate(known.user_ids)}

    def scores(user: str) -> np.ndarray:
        if user not in row:
            return np.zeros(shape[1])
        mine = unit @ has[row[user]].T  # [users, 1]: the sum of the columns of the user's items
        return (unit.T @ mine).toarray()[:, 0]

    return scores


def _of_vectors(known: Interactions, table: UserTable) -> dict[str, Way]:
    given = table.lookup(known.user_ids, known.user_ids).astype(np.float64)
    there = ~np.isnan(given[:, 0])
    row = {user: place for place, user in enumerate(known.user_ids)}
    nobody = np.zeros(given.shape[1])

    def sums(vectors: np.ndarray) -> np.ndarray:
        """[items, E]: those of each item's users, added up."""
        out = np.zeros((len(known.titles), vectors.shape[1]))
        np.add.at(out, known.items, vectors[known.users])
        return out

    def way(items: np.ndarray, vectors: np.ndarray) -> Way:
        return lambda user: items @ (vectors[row[user]] if user in row else nobody)

    centred = np.where(there[:, None], given - given[there].mean(axis=0), 0.0)
    means = sums(centred)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    plain = np.where(there[:, None], given, 0.0)
    factors = sums(plain) @ np.linalg.pinv(plain.T @ plain, hermitian=True)
    return {"vectors": way(means, centred), "vectors (dot product)": way(factors, plain)}
