"""Ranking by likelihood: the true reply among candidates, and the true user among others.

All candidates of all records are examples like any other, packed into rows of one shape and scored by one compiled
step. A tie counts against the true one by half.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from e2p_jax.config import Condition
from e2p_jax.data.conditions import user_vectors
from e2p_jax.data.encode import Encoder, Example
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.train.run import Run
from e2p_jax.train.score import Scorer
from e2p_jax.vectors.source import Vectors


def ranks(scores: np.ndarray) -> np.ndarray:
    """[N, C] scores, lower is better, NaN where there is none, the true one first -> [N] ranks from 1."""
    true = scores[:, :1]
    better, equal = (scores[:, 1:] < true).sum(axis=1), (scores[:, 1:] == true).sum(axis=1)
    return 1 + better + equal / 2


def rank_statistics(rank: np.ndarray) -> dict[str, np.ndarray]:
    """[N] ranks of one relevant item, 0 where a record has no candidates -> statistics of the ranking measures."""
    there = rank > 0
    safe = np.where(there, rank, 1.0)
    values: dict[str, np.ndarray] = {f"hits@{k}": rank <= k for k in (1, 5, 10)}
    values |= {"mrr": 1 / safe, "ndcg@10": np.where(rank <= 10, 1 / np.log2(1 + safe), 0.0)}
    return {name: np.stack([value * there, there], axis=1).astype(np.float64) for name, value in values.items()}


def with_candidates(records: Sequence[Record], count: int, seed: int = 0) -> list[Record]:
    """Gives records without candidates their own last reply and `count` - 1 last replies of other users, drawn
    uniformly: what ConvAI2 does. Records that bring candidates keep them.

    Raises:
      UserError: too few other replies.
    """
    replies = [record.messages[-1]["content"] for record in records]
    out = []
    for row, record in enumerate(records):
        if not record.candidates:
            rng = np.random.default_rng([seed, row])
            others = sorted({r for r, o in zip(replies, records, strict=True) if o.user_id != record.user_id})
            others = [reply for reply in others if reply != replies[row]]
            if len(others) < count - 1:
                raise UserError(f"{record.source}: {len(others)} other replies, evaluate.candidates={count} needs more")
            drawn = rng.choice(len(others), count - 1, replace=False)
            record = dataclasses.replace(record, candidates=(replies[row], *(others[i] for i in drawn)))
        out.append(record)
    return out


def candidate_examples(
    record: Record, conditions: Sequence[Condition], encoder: Encoder
) -> dict[Condition, list[Example]]:
    """The conversation with each candidate in place of its last reply; only that reply is a target."""
    spoken = [
        dataclasses.replace(record, messages=(*record.messages[:-1], {"role": "assistant", "content": text}))
        for text in record.candidates
    ]
    # What is too long with one candidate loses the same turns with all.
    fitted = min((encoder.fit(each, conditions).record for each in spoken), key=lambda each: len(each.messages))
    before = fitted.messages[:-1]
    out: dict[Condition, list[Example]] = {}
    for condition in conditions:
        prompt = len(encoder.encode_prompt(dataclasses.replace(record, messages=before), condition).tokens)
        out[condition] = []
        for each in spoken:
            example = encoder.encode(dataclasses.replace(each, messages=(*before, each.messages[-1])), condition)
            is_target = example.is_target & (np.arange(len(example.tokens)) >= prompt)
            out[condition].append(example._replace(is_target=is_target))
    return out


def candidate_nll(
    run: Run, scorer: Scorer, records: Sequence[Record], conditions: Sequence[Condition]
) -> dict[Condition, np.ndarray]:
    """[N, C] NLL per token of every candidate, the true one first; NaN where a record has fewer than another.

    Args:
      records: that end with an assistant turn and bring candidates.
    """
    encoder = run.inputs.encoder
    examples = [candidate_examples(record, conditions, encoder) for record in records]
    counts = [len(record.candidates) for record in records]
    groups = {}
    for condition in conditions:
        vectors = user_vectors(records, condition, run.inputs.table, run.population)
        repeated = Vectors(vectors.source, np.repeat(vectors.rows, counts))
        groups[condition] = ([e for each in examples for e in each[condition]], repeated)
    out = {}
    for condition, nll in scorer.nll(groups).items():
        tokens = [int(example.is_target.sum()) for example in groups[condition][0]]
        out[condition] = np.full((len(counts), max(counts)), np.nan)
        out[condition][np.arange(max(counts))[None] < np.array(counts)[:, None]] = nll / np.array(tokens)
    return out


def rank_users(run: Run, scorer: Scorer, records: Sequence[Record], condition: Condition, count: int) -> np.ndarray:
    """[N] rank of the record's own user among `count`, by the likelihood that the record has with each one's vector:
    the others are drawn uniformly from the split.

    Raises:
      UserError: the split has fewer users.
    """
    by_user = {record.user_id: record for record in records}
    users = sorted(by_user)
    if len(users) < count:
        raise UserError(f"evaluate.candidates={count}: the split has {len(users)} users only; lower it")
    asked = []
    for row, record in enumerate(records):
        others = [user for user in users if user != record.user_id]
        drawn = np.random.default_rng([1, row]).choice(len(others), count - 1, replace=False)
        asked += [record, *(by_user[others[i]] for i in drawn)]
    vectors = user_vectors(asked, condition, run.inputs.table, run.population)
    fitted = [run.inputs.encoder.fit(record, [condition]).examples[condition] for record in records]
    examples = [example for example in fitted for _ in range(count)]
    return ranks(scorer.nll({condition: (examples, vectors)})[condition].reshape(-1, count))
