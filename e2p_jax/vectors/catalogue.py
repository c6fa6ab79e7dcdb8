"""The catalogue: items by id, each with a vector, in the order of the rows of an output vocabulary."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from e2p_jax.errors import UserError, shown
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import UserTable, open_table


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """I items, the first `known` of which training knew; the others came later."""

    table: UserTable  # of item vectors [I, G]
    known: int

    @classmethod
    def open(cls, items: str) -> "Catalogue":
        """What `data.items` names.

        Raises:
          UserError: no such table, an item stands in it twice, or does not fit on a line of a run's list.
        """
        table = open_table(items, "null", "data.items")
        if len(table) != table.index.rows:
            raise UserError(f"{table.source}: an item stands there twice; keep one")
        if broken := next((item for item in table.ids if "\n" in item), None):
            raise UserError(f"{table.source}: item id {shown(broken)} holds a line break; rename that item")
        return cls(table, len(table))

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """[n] int32: where items are; -1 for one that is not here."""
        return self.table.index.find(ids).astype(np.int32)

    def given(self) -> np.ndarray:
        """[I, G] float32, each number less its mean over the known items, in units of its spread among them."""
        vectors = self.table.gather(np.arange(len(self)))
        mean, std = Population.of(vectors[: self.known])
        return (vectors - mean) / std

    def digest(self) -> str:
        """Of every id and vector, in their order."""
        digest = hashlib.sha256(self.table.index.text.data)
        digest.update(np.ascontiguousarray(self.table.vectors).data)
        return digest.hexdigest()

    def behind(self, ids: Sequence[str], run: str) -> "Catalogue":
        """The same with the items that a run knew in front, in its order.

        Raises:
          UserError: one of them is not here.
        """
        rows = self.rows(ids)
        if len(absent := np.flatnonzero(rows < 0)):
            raise UserError(
                f"{self.table.source}: item {shown(ids[int(absent[0])])} of {run}/items.txt has no vector; add it"
            )
        if np.array_equal(rows, np.arange(len(rows))):
            return dataclasses.replace(self, known=len(rows))
        order = np.concatenate([rows, np.setdiff1d(np.arange(len(self)), rows)])
        names, vectors = self.table.index.ids(order), np.asarray(self.table.vectors)[order]
        return Catalogue(UserTable(names, vectors, self.table.source, "null"), len(rows))
