"""Summed NLL of every record under a condition."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from e2p_jax.config import Condition
from e2p_jax.data.conditions import Population, user_vectors
from e2p_jax.data.embeddings import UserTable
from e2p_jax.data.encode import Encoder
from e2p_jax.data.packing import Budget, choose_budget
from e2p_jax.data.pipeline import PackedDataset, eval_batches, pack
from e2p_jax.data.records import Record
from e2p_jax.prefix.model import Batch


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per record, in input order."""

    nll: np.ndarray  # [N] float64, nats summed over the record's targets
    targets: np.ndarray  # [N] int64, tokens
    words: np.ndarray  # [N] int64, white-space words of the targets

    @property
    def per_target(self) -> float:
        return float(self.nll.sum() / self.targets.sum())

    @property
    def word_perplexity(self) -> float:
        """exp(nats per word); the end-of-turn tokens' nats are counted, their words are not."""
        return float(np.exp(self.nll.sum() / self.words.sum()))


def pack_conditions(
    records: Sequence[Record],
    conditions: Sequence[Condition],
    encoder: Encoder,
    table: UserTable | None,
    population: Population,
) -> tuple[dict[Condition, PackedDataset], list[Record], int]:
    """The same records under several conditions, in rows of one shape.

    A record too long under one condition loses the same turns under all, so that all score the same targets.

    Returns:
      Datasets by condition, the records as scored, and how many messages were dropped.
    """
    fitted = [encoder.fit(record, conditions) for record in records]
    kept = [fit.record for fit in fitted]
    examples = {c: [fit.examples[c] for fit in fitted] for c in conditions}
    budgets = [choose_budget(examples[c], encoder.max_length) for c in conditions]
    budget = Budget(*(max(sizes) for sizes in zip(*budgets, strict=True)))
    packed = {c: pack(examples[c], user_vectors(kept, c, table, population), encoder, budget) for c in conditions}
    return packed, kept, sum(fit.dropped_messages for fit in fitted)


def score(
    dataset: PackedDataset,
    records: Sequence[Record],
    evaluate: Callable[[Batch], jax.Array],
    mesh: jax.sharding.Mesh,
    batch_rows: int,
) -> Scores:
    """Runs `evaluate` ([B, S] nats per segment) over all rows."""
    nll = np.zeros(len(records), np.float64)
    for batch, members in eval_batches(dataset, mesh, batch_rows):
        sums = np.asarray(jax.device_get(evaluate(batch)))
        for row, numbers in enumerate(members):
            nll[list(numbers)] = sums[row, : len(numbers)]
    targets = np.array([int(e.is_target.sum()) for e in dataset.examples])
    return Scores(nll, targets, np.array([record.reply_words for record in records]))
