"""Measures as sums, what can be said of their differences, and the sums of those on generated texts.

A measure has statistics that add up over records, [N, k], and a value that is a function of their sums. So any of them,
corpus BLEU too, can be taken over a resampled set of users: a bootstrap and a permutation test serve all. Where another
user stands in front, who that is was drawn: statistics in R derangements are [R, N, k], their sums the mean of the R.
"""

import collections
import dataclasses
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from e2p_jax.datasets.records import Record

MOST = 200_000  # numbers of a block of resampled weights


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column of the table: its label, and how its value is worked out."""

    label: str
    value: Callable[[np.ndarray], np.ndarray]  # sums [..., k] -> [...]
    digits: int = 3


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def perplexity_of(sums: np.ndarray) -> np.ndarray:
    """The ratio's exponential, held to that of 700 nats: floats have no more, and text without spaces is one word."""
    return np.exp(np.minimum(_ratio(sums), 700.0))  # type: ignore[no-any-return]


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100 * _ratio(sums)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4, 0 to 100, of sacreBLEU's ten statistics: lengths of hypotheses and references, 4 n-grams found
    and 4 there (Papineni et al., 2002; smoothed as sacreBLEU does by default).
    """
    from sacrebleu.metrics.bleu import BLEU

    rows = sums.reshape(-1, 10).round().astype(int)
    scores = [
        BLEU.compute_bleu(list(r[2:6]), list(r[6:]), int(r[0]), int(r[1]), smooth_method="exp").score for r in rows
    ]
    return np.array(scores).reshape(sums.shape[:-1])


MEASURES: dict[str, Measure] = {
    "nll_per_target": Measure("NLL per target", _ratio, 4),
    "word_perplexity": Measure("PPL per word", perplexity_of, 2),
    "bits_per_byte": Measure("bits per byte", lambda sums: _ratio(sums) / np.log(2), 4),
    **{
        among + name: Measure(said + label, value, digits)
        for among, said in (("", ""), ("item_", "item "), ("all_", "of all items "))
        for name, label, value, digits in (
            ("hits@1", "Hits@1 %", _percent, 1),
            ("hits@5", "Hits@5 %", _percent, 1),
            ("hits@10", "Hits@10 %", _percent, 1),
            ("mrr", "MRR", _ratio, 3),
            ("ndcg@10", "NDCG@10", _ratio, 3),
            ("coverage@10", "coverage@10 %", _percent, 1),
            ("popularity@10", "popularity@10", _ratio, 2),
            ("cold_hits@10", "cold Hits@10 %", _percent, 1),
            ("cold_mrr", "cold MRR", _ratio, 3),
            ("cold_own_hits@10", "cold among cold Hits@10 %", _percent, 1),
            ("cold_own_mrr", "cold among cold MRR", _ratio, 3),
        )
    },
    "user_rank": Measure("rank of the user", _ratio, 2),
    "user_first": Measure("user first %", _percent, 1),
    "f1": Measure("word F1 %", _percent, 1),
    "title": Measure("names a title %", _percent, 1),
    "own_title": Measure("names the user's title %", _percent, 1),
    "bleu": Measure("BLEU", bleu, 2),
    "rouge1": Measure("ROUGE-1 %", _percent, 1),
    "rouge2": Measure("ROUGE-2 %", _percent, 1),
    "rougeL": Measure("ROUGE-L %", _percent, 1),
    "rouge1_best": Measure("ROUGE-1 best %", _percent, 1),
    "rouge2_best": Measure("ROUGE-2 best %", _percent, 1),
    "rougeL_best": Measure("ROUGE-L best %", _percent, 1),
    "distinct1": Measure("distinct1", _ratio),
    "distinct2": Measure("distinct2", _ratio),
}


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, drawn: np.ndarray) -> "Interval":
        """The percentiles of values over resampled users."""
        low, high = np.quantile(drawn, [0.025, 0.975])
        return cls(float(value), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Condition minus baseline, with a 95 % interval and the p value of a paired test."""

    mean: float
    low: float
    high: float
    p: float
    p_least: float  # that a test of so many users and permutations can give


def sums_by_user(groups: Sequence[np.ndarray], users: Sequence[str]) -> list[np.ndarray]:
    """[N, k] or [R, N, k] per record -> [R, U, k], for each group: two records of one user are not independent, and
    stay together. Records that add nothing were not measured, and their users have no part.
    """
    drawn = [statistics.reshape(-1, *statistics.shape[-2:]) for statistics in groups]
    measured = np.any([statistics.any(axis=(0, 2)) for statistics in drawn], axis=0)
    names, owner = np.unique(np.asarray(users, str)[measured], return_inverse=True)
    out = []
    for statistics in drawn:
        sums = np.zeros((len(names), len(statistics), statistics.shape[2]))
        np.add.at(sums, owner, statistics[:, measured].swapaxes(0, 1))
        out.append(sums.swapaxes(0, 1))
    return out


def total(sums: np.ndarray) -> np.ndarray:
    """[R, U, k] by user -> [k], over users, the mean over derangements."""
    return sums.sum(axis=1).mean(axis=0)


def blocks(samples: int, users: int) -> list[int]:
    """Sizes of the blocks that `samples` are drawn in, so that no block of weights [block, U] is large."""
    most = max(1, MOST // users)
    return [most] * (samples // most) + ([samples % most] if samples % most else [])


def bootstrap(groups: Sequence[np.ndarray], value: Callable[[np.ndarray], np.ndarray], samples: int) -> np.ndarray:
    """[samples, len(groups)]: values over users drawn with replacement, the same ones for every group [R, U, k]
    (Efron & Tibshirani, 1993). Derangements are drawn so, too, the same ones for all groups that have as many (of both
    ways: Owen, 2007, who shows that such an interval errs to the wide side).
    """
    rng, users = np.random.default_rng(0), groups[0].shape[1]
    others = {many: np.random.default_rng([3, many]) for many in sorted({len(sums) for sums in groups})}
    drawn = []
    for size in blocks(samples, users):
        counts = rng.multinomial(users, np.full(users, 1 / users), size=size)
        shares = {many: r.multinomial(many, np.full(many, 1 / many), size=size) / many for many, r in others.items()}
        resampled = [np.einsum("rsk,sr->sk", counts @ sums, shares[len(sums)]) for sums in groups]
        drawn.append(np.stack([value(sums) for sums in resampled], axis=-1))
    return np.concatenate(drawn)


def permutation_p(
    a: np.ndarray, b: np.ndarray, value: Callable[[np.ndarray], np.ndarray], samples: int
) -> tuple[float, float]:
    """Two-sided p of "it does not matter which of the two a user gets": each user's sums [U, k], the mean over
    derangements, change sides, in every way there is where there are at most `samples` of them (Fisher, 1935), else at
    random (approximate randomisation; Noreen, 1989).

    Returns:
      p, and the least p that this test can give.
    """
    users, rng, change = len(a), np.random.default_rng(1), b - a
    total_a, total_b = a.sum(axis=0), b.sum(axis=0)
    observed, extreme = abs(value(total_a) - value(total_b)), 0
    exact = users < 63 and 2**users <= samples
    for size in [2**users] if exact else blocks(samples, users):
        drawn = np.arange(size)[:, None] >> np.arange(users) & 1 if exact else rng.integers(0, 2, (size, users))
        moved = drawn @ change
        extreme += int((abs(value(total_a + moved) - value(total_b - moved)) >= observed * (1 - 1e-9)).sum())
    if exact:
        return extreme / 2**users, min(2 / 2**users, 1.0)
    return (extreme + 1) / (samples + 1), 1 / (samples + 1)


def p_text(p: float, least: float) -> str:
    """A p value to two digits; the least that its test can give is a bound, not a value (0: not known)."""
    if p > least:
        return f"{p:.2g}"
    digits = 1 - math.floor(math.log10(least))
    return f"<= {math.ceil(round(least * 10**digits, 6)) / 10**digits:g}"


def _number(number: float, digits: int) -> str:
    return f"{number:.{digits}f}" if abs(number) < 1e9 else f"{number:.1e}"


def value_text(name: str, entry: Mapping[str, float] | None) -> str:
    """A measure's value as tables show it."""
    return _number(entry["value"], MEASURES[name].digits) if entry else ""


def interval_text(name: str, entry: Mapping[str, float] | None) -> str:
    """Its interval, where there is one."""
    digits = MEASURES[name].digits
    return f"[{_number(entry['low'], digits)}, {_number(entry['high'], digits)}]" if entry and "low" in entry else ""


def interval(name: str, statistics: np.ndarray, users: Sequence[str], samples: int) -> Interval:
    """A measure's value and its 95 % interval, a percentile bootstrap over users and derangements."""
    value, (sums,) = MEASURES[name].value, sums_by_user([statistics], users)
    return Interval.of(float(value(total(sums))), bootstrap([sums], value, samples))


def difference(name: str, ours: np.ndarray, theirs: np.ndarray, users: Sequence[str], samples: int) -> Difference:
    """Of two conditions on the same records: paired bootstrap and paired permutation test, both over users.

    Args:
      name: of the measure.
      ours: [N, k] or [R, N, k] statistics.
      theirs: the same of the other.
      users: N ids.
      samples: of bootstrap and test, each.
    """
    value = MEASURES[name].value
    a, b = sums_by_user([ours, theirs], users)
    drawn = bootstrap([a, b], value, samples)
    found = Interval.of(float(value(total(a)) - value(total(b))), drawn[:, 0] - drawn[:, 1])
    return Difference(*found, *permutation_p(a.mean(axis=0), b.mean(axis=0), value, samples))


class Share(NamedTuple):
    """What one gain is of another; gains are of a condition over the same with another user in front."""

    gain: Interval
    whole: Interval
    share: Interval | None  # gain / whole; none where the whole is not told from zero: a ratio to it says nothing


def share_of(
    gain: tuple[np.ndarray, np.ndarray], whole: tuple[np.ndarray, np.ndarray], users: Sequence[str], samples: int
) -> Share:
    """A ratio of means; its interval is a percentile bootstrap over users and derangements, all four resampled alike.

    Args:
      gain: statistics of `nll_per_target` with the user's own in front, and with another's; [N, 2] or [R, N, 2].
      whole: the same, of what the gain is a share of.
    """
    value, sums = MEASURES["nll_per_target"].value, sums_by_user([*gain, *whole], users)
    own, other, whole_own, whole_other = (float(value(total(group))) for group in sums)
    drawn = bootstrap(sums, value, samples)
    gains, wholes = drawn[:, 1] - drawn[:, 0], drawn[:, 3] - drawn[:, 2]
    part, all_of_it = Interval.of(other - own, gains), Interval.of(whole_other - whole_own, wholes)
    if all_of_it.low <= 0:
        return Share(part, all_of_it, None)
    return Share(part, all_of_it, Interval.of(part.value / all_of_it.value, gains / wholes))


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
