"""Holds generated replies against what was said: word F1, BLEU, ROUGE, distinct n-grams."""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

from e2p_jax.datasets.records import Record

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _words(text: str) -> list[str]:
    """ParlAI's normal form: lower case, no punctuation, no articles."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return _ARTICLES.sub(" ", text).split()


def word_f1(reply: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words, as ConvAI2 counts it."""
    ours, theirs = _words(reply), _words(truth)
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def distinct(replies: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of the replies (Li et al., arXiv 1510.03055)."""
    words = [reply.split() for reply in replies]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def text_statistics(replies: Sequence[str], records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Statistics of the measures on texts, [N, k], against each record's last turn; `_best` ones against the best
    match among that and the record's references, where any record has such.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    truths = [record.messages[-1]["content"] for record in records]
    one = np.ones(len(records))
    f1 = [word_f1(reply, truth) for reply, truth in zip(replies, truths, strict=True)]
    out = {"f1": np.stack([f1, one], axis=1)}
    sacre = BLEU()
    found = [sacre.corpus_score([r], [[t]]) for r, t in zip(replies, truths, strict=True)]
    out["bleu"] = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in found], np.float64)
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    targets: dict[str, list[tuple[str, ...]]] = {"": [(truth,) for truth in truths]}
    if any(record.references for record in records):
        targets["_best"] = [(truth, *r.references) for truth, r in zip(truths, records, strict=True)]
    for suffix, accepted in targets.items():
        scores = [scorer.score_multi(texts, reply) for texts, reply in zip(accepted, replies, strict=True)]
        for kind in kinds:
            out[kind + suffix] = np.stack([[score[kind].fmeasure for score in scores], one], axis=1)
    return out
