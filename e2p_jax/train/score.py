"""Summed NLL of records and examples."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from e2p_jax.config import Condition
from e2p_jax.data.columns import Texts
from e2p_jax.data.conditions import FRONTS, draws, spelled_out, user_vectors
from e2p_jax.data.encode import Encoder, Example
from e2p_jax.data.examples import Examples
from e2p_jax.data.packing import Budget, choose_budget
from e2p_jax.data.pipeline import PackedDataset, eval_batches, pack
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError, shown
from e2p_jax.prefix.model import Batch
from e2p_jax.train.partition import split
from e2p_jax.train.run import Run
from e2p_jax.train.setup import jit_eval_step
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.source import Vectors
from e2p_jax.vectors.table import UserTable

Key = TypeVar("Key", bound=Hashable)
Arm = tuple[Condition, int]  # and the number of its derangement


@dataclasses.dataclass(frozen=True)
class Scores:
    """Measurements under one condition: per record, in input order."""

    drawn: np.ndarray  # [R, N] float64, nats summed over the record's targets, in each of R derangements
    targets: np.ndarray  # [N] int64, tokens
    words: np.ndarray  # [N] int64, white-space words of the targets
    bytes: np.ndarray  # [N] int64, of the targets as UTF-8
    more: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [N, k] statistics of further measures
    replies: tuple[str, ...] = ()  # what was generated, for N records or none

    @property
    def nll(self) -> np.ndarray:
        """[N] float64: nats summed over the record's targets, the mean over the derangements."""
        return self.drawn.mean(axis=0)

    @property
    def per_target(self) -> float:
        return float(np.divide(self.nll.sum(), self.targets.sum()))

    @property
    def word_perplexity(self) -> float:
        """exp(nats per word); the end-of-turn tokens' nats are counted, their words are not."""
        return float(np.exp(np.divide(self.nll.sum(), self.words.sum())))

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """By measure (`e2p_jax.evaluate.measures`), [R, N, k], or [N, k] of further ones."""
        per = {"nll_per_target": self.targets, "word_perplexity": self.words, "bits_per_byte": self.bytes}
        return {
            name: np.stack(np.broadcast_arrays(self.drawn, count), axis=-1) for name, count in per.items()
        } | self.more


def pack_groups(groups: Mapping[Key, tuple[Sequence[Example], Vectors]], encoder: Encoder) -> dict[Key, Any]:
    """Examples and their vectors, group by group, in rows of one shape: one compilation scores all groups."""
    held = {key: Examples.of(examples) for key, (examples, _) in groups.items()}
    budgets = [choose_budget(examples, encoder.max_length) for examples in held.values()]
    budget = Budget(*(max(sizes) for sizes in zip(*budgets, strict=True)))
    if encoder.catalogue is not None:  # whose items are ranked for records that name none of them, too
        budget = budget._replace(items=max(budget.items, 1))
    return {key: pack(held[key], vectors, encoder, budget) for key, (_, vectors) in groups.items()}


def fit_arms(
    records: Sequence[Record], conditions: Sequence[Condition], encoder: Encoder, derangements: int = 1
) -> tuple[list[Record], dict[Arm, list[Example]], int]:
    """The same records under several conditions.

    A record too long under one condition or derangement loses the same turns under all, so that all score the same
    targets.

    Returns:
      The records as scored; their examples by arm, of which `shuffled` has one, for its derangements differ in vectors
      alone; and how many messages were dropped.
    """
    versions = {
        (condition, draw): list(spelled_out(records, condition, draw))
        for condition, draw in _arms(records, conditions, derangements)
        if draw == 0 or FRONTS[condition].context == "other"
    }
    kept: list[Record] = []
    examples: dict[Arm, list[Example]] = {arm: [] for arm in versions}
    dropped = 0
    for row in range(len(records)):
        fits = {arm: encoder.fit(version[row], [arm[0]]) for arm, version in versions.items()}
        shortest = min(fits.values(), key=lambda fit: len(fit.record.messages))
        kept.append(dataclasses.replace(shortest.record, context=records[row].context))
        dropped += shortest.dropped_messages
        for arm, fit in fits.items():
            cut = dataclasses.replace(fit.record, messages=kept[-1].messages)
            same = len(fit.record.messages) == len(cut.messages)
            examples[arm].append(fit.examples[arm[0]] if same else encoder.encode(cut, arm[0]))
    return kept, examples, dropped


def _arms(records: Sequence[Record], conditions: Sequence[Condition], derangements: int) -> list[Arm]:
    users = {record.user_id for record in records}
    return [(c, draw) for c in dict.fromkeys(conditions) for draw in range(draws(c, users, derangements))]


def pack_conditions(
    records: Sequence[Record],
    conditions: Sequence[Condition],
    encoder: Encoder,
    table: UserTable | None,
    population: Population,
    derangements: int = 1,
) -> tuple[dict[Arm, PackedDataset], list[Record], int]:
    """The same records and targets under several conditions, as `fit_arms` has them.

    Returns:
      Datasets by arm, the records as scored, and how many messages were dropped.
    """
    kept, examples, dropped = fit_arms(records, conditions, encoder, derangements)
    vectors = {
        arm: user_vectors(kept, arm[0], table, population, arm[1]) for arm in _arms(kept, conditions, derangements)
    }
    packed = pack_groups({arm: (found, vectors[arm]) for arm, found in examples.items()}, encoder)
    by_arm = {arm: packed.get(arm, packed[arm[0], 0]) for arm in vectors}
    return {arm: dataclasses.replace(by_arm[arm], vectors=held) for arm, held in vectors.items()}, kept, dropped


def example_nll(
    dataset: PackedDataset, evaluate: Callable[[Batch], jax.Array], mesh: jax.sharding.Mesh, batch_rows: int
) -> np.ndarray:
    """[N] float64: each example's nats, through `evaluate` ([B, S] nats per segment) over all rows.

    Raises:
      UserError: naming users for whom they are not finite.
    """
    nll = np.zeros(len(dataset.examples), np.float64)
    for batch, members in eval_batches(dataset, mesh, batch_rows):
        sums = np.asarray(jax.device_get(evaluate(batch)))
        for row, numbers in enumerate(members):
            nll[list(numbers)] = sums[row, : len(numbers)]
    refuse_not_finite(nll, dataset.examples.users)
    return nll


def refuse_not_finite(nll: np.ndarray, users: Sequence[str] | Texts) -> None:
    """Raises a UserError that names the users of whose N conversations the NLL is not finite."""
    if len(wrong := np.flatnonzero(~np.isfinite(nll))):
        raise UserError(
            f"the NLL of {len(wrong)} of {len(nll)} conversations is not finite, those of "
            f"{some(users[int(n)] for n in wrong)}; look at their vectors and texts, or take an earlier checkpoint"
        )


def some(users: Iterable[str]) -> str:
    """Each once, in order, and not more than a line holds."""
    names = list(dict.fromkeys(users))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(shown, names[:8])) + more


def score(
    dataset: PackedDataset,
    records: Sequence[Record],
    evaluate: Callable[[Batch], jax.Array],
    mesh: jax.sharding.Mesh,
    batch_rows: int,
    of_items: bool = False,
) -> Scores:
    """Scores of records that are the dataset's examples.

    Args:
      of_items: `evaluate` gives the cross-entropy of a segment's items, and a target is a record that names such.
    """
    nll = example_nll(dataset, evaluate, mesh, batch_rows)
    targets = (dataset.examples.item_counts > 0).astype(np.int64) if of_items else dataset.examples.target_counts
    words = np.array([record.reply_words for record in records])
    return Scores(nll[None], targets, words, np.array([record.reply_bytes for record in records]))


class Scorer:
    """Scores examples with a run's model; groups that are scored together share one compilation."""

    def __init__(self, run: Run):
        trainable, frozen = split(run.model.params, run.model.mask)
        step = jit_eval_step(run.model)
        self.mesh, self.encoder, self.batch_rows = run.model.mesh, run.inputs.encoder, run.inputs.config.train.rows
        self.evaluate: Callable[[Batch], jax.Array] = lambda batch: step(trainable, frozen, batch)
        query = jit_eval_step(run.model, items="item_queries")
        self._query: Callable[[Batch], jax.Array] = lambda batch: query(trainable, frozen, batch)
        self._model = run.model

    def scores(self, dataset: PackedDataset, records: Sequence[Record]) -> Scores:
        """Scores of records that are the dataset's examples."""
        with jax.set_mesh(self.mesh):
            return score(dataset, records, self.evaluate, self.mesh, self.batch_rows)

    def item_queries(self, dataset: PackedDataset) -> np.ndarray:
        """[N, R] float32: of the examples, for the head over the catalogue."""
        queries = np.zeros((len(dataset.examples), self._model.params["items"]["query"].shape[1]), np.float32)
        with jax.set_mesh(self.mesh):
            for batch, members in eval_batches(dataset, self.mesh, self.batch_rows):
                of_rows = np.asarray(jax.device_get(self._query(batch)))
                for row, numbers in enumerate(members):
                    queries[list(numbers)] = of_rows[row, : len(numbers)]
        return queries

    def item_rows(self) -> np.ndarray:
        """[I, R] float32: of the catalogue's items."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._model.merged.items.rows())

    def nll(self, groups: Mapping[Key, tuple[Sequence[Example], Vectors]]) -> dict[Key, np.ndarray]:
        """Examples and their vectors by group -> [N] nats by group."""
        return {key: self.example_nll(dataset) for key, dataset in pack_groups(groups, self.encoder).items()}

    def example_nll(self, dataset: PackedDataset) -> np.ndarray:
        """[N] nats; datasets of one row's shape share one compilation."""
        with jax.set_mesh(self.mesh):
            return example_nll(dataset, self.evaluate, self.mesh, self.batch_rows)
