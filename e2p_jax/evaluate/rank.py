"""Ranking the true reply among candidates, and the true user among others.

By likelihood, the conversation in front of the candidates read once. A tie counts against the true one by half.
"""

import bisect
import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from e2p_jax.config import Condition
from e2p_jax.data.conditions import spelled_out
from e2p_jax.data.encode import Encoder, Example
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError, shown
from e2p_jax.evaluate.branches import branch_nll
from e2p_jax.train.run import Run
from e2p_jax.train.score import Scorer


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


def with_candidates(records: Sequence[Record], count: int) -> list[Record]:
    """Gives records without candidates their own last reply and `count` - 1 last replies of other users, drawn
    uniformly: what ConvAI2 does. Records that bring candidates keep them.

    Raises:
      UserError: too few other replies, or a record whose first candidate is not its reply.
    """
    replies = [record.messages[-1]["content"] for record in records]
    pool = sorted(set(replies))
    said: dict[str, set[str]] = {}
    for record, reply in zip(records, replies, strict=True):
        said.setdefault(record.user_id, set()).add(reply)
    sayers = collections.Counter(reply for own in said.values() for reply in own)
    out = []
    for row, record in enumerate(records):
        if not record.candidates:
            own = {reply for reply in said[record.user_id] if sayers[reply] == 1} | {replies[row]}
            if len(pool) - len(own) < count - 1:
                left = f"{len(pool) - len(own)} other replies"
                raise UserError(f"{record.source}: {left}, evaluate.candidates={count} needs more; lower it")
            drawn = np.random.default_rng([0, row]).choice(len(pool) - len(own), count - 1, replace=False)
            for place in sorted(bisect.bisect_left(pool, reply) for reply in own):
                drawn[drawn >= place] += 1
            record = dataclasses.replace(record, candidates=(replies[row], *(pool[i] for i in drawn)))
        elif record.candidates[0].strip() != replies[row].strip():
            raise UserError(
                f"{record.source}: the first of `candidates`, {shown(record.candidates[0])}, is not the last reply, "
                f"{shown(replies[row])}; put the true one first"
            )
        elif len(record.candidates) < 2:
            raise UserError(f"{record.source}: the true reply is the only one of `candidates`; give others, or none")
        out.append(record)
    return out


def candidate_examples(versions: Mapping[Condition, Record], encoder: Encoder) -> dict[Condition, list[Example]]:
    """The conversation with each candidate in place of its last reply; only that reply is a target.

    Args:
      versions: the record as each condition spells it out.
    """
    spoken = {  # without items: the true one must not stand in front of the others
        condition: [
            dataclasses.replace(
                record, messages=(*record.messages[:-1], {"role": "assistant", "content": text}), items=()
            )
            for text in record.candidates
        ]
        for condition, record in versions.items()
    }
    # What is too long with one candidate, under one condition, loses the same turns with all.
    fitted = [encoder.fit(each, [condition]).record for condition, talks in spoken.items() for each in talks]
    before = min(fitted, key=lambda each: len(each.messages)).messages[:-1]
    out: dict[Condition, list[Example]] = {}
    for condition, record in versions.items():
        prompt = len(encoder.encode_prompt(dataclasses.replace(record, messages=before), condition).tokens)
        out[condition] = []
        for each in spoken[condition]:
            example = encoder.encode(dataclasses.replace(each, messages=(*before, each.messages[-1])), condition)
            is_target = example.is_target & (np.arange(len(example.tokens)) >= prompt)
            out[condition].append(example._replace(is_target=is_target))
    return out


def candidate_nll(run: Run, records: Sequence[Record], conditions: Sequence[Condition]) -> dict[Condition, np.ndarray]:
    """[N, C] NLL per token of every candidate, the true one first; NaN where a record has fewer than another.

    Args:
      records: that end with an assistant turn and bring candidates.
    """
    encoder = run.inputs.encoder
    versions = {condition: list(spelled_out(records, condition)) for condition in conditions}
    examples = [
        candidate_examples({condition: versions[condition][row] for condition in conditions}, encoder)
        for row in range(len(records))
    ]
    out = {}
    for condition in conditions:
        groups = [each[condition] for each in examples]
        out[condition] = np.full((len(groups), max(map(len, groups))), np.nan)
        for row, nll in enumerate(branch_nll(run, groups, run.vectors(records, condition), f"rank under {condition}")):
            out[condition][row, : len(nll)] = nll / [example.is_target.sum() for example in groups[row]]
    return out


def check_users(records: Sequence[Record], count: int) -> None:
    """Raises a UserError where the records have fewer users than that."""
    if (users := len({record.user_id for record in records})) < count:
        raise UserError(f"evaluate.candidates={count}: the split has {users} users only; lower it")


def rank_users(run: Run, scorer: Scorer, records: Sequence[Record], condition: Condition, count: int) -> np.ndarray:
    """[N] rank of the record's own user among `count`, by the likelihood that the record has with each one's vector:
    the others are drawn uniformly from the split.

    Raises:
      UserError: the split has fewer users.
    """
    check_users(records, count)
    by_user = {record.user_id: record for record in records}
    users = sorted(by_user)
    asked = []
    for row, record in enumerate(records):
        others = [user for user in users if user != record.user_id]
        drawn = np.random.default_rng([1, row]).choice(len(others), count - 1, replace=False)
        asked += [record, *(by_user[others[i]] for i in drawn)]
    vectors = run.vectors(asked, condition)
    fitted = [run.inputs.encoder.fit(record, [condition]).examples[condition] for record in records]
    examples = [example for example in fitted for _ in range(count)]
    return ranks(scorer.nll({condition: (examples, vectors)})[condition].reshape(-1, count))
