"""Measures as sums, and what can be said of their differences.

A measure has statistics that add up over records, [N, k], and a value that is a function of their sums. So any of them,
corpus BLEU too, can be taken over a resampled set of users: a bootstrap and a permutation test serve all.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

MOST = 200_000  # numbers of a block of resampled weights


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column of the table: its label, and how its value is worked out."""

    label: str
    value: Callable[[np.ndarray], np.ndarray]  # sums [..., k] -> [...]
    higher_is_better: bool
    digits: int = 3


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


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
    "nll_per_target": Measure("NLL per target", _ratio, False, 4),
    "word_perplexity": Measure("PPL per word", lambda sums: np.exp(_ratio(sums)), False, 2),
    "bits_per_byte": Measure("bits/byte", lambda sums: _ratio(sums) / np.log(2), False, 4),
    "hits@1": Measure("Hits@1 %", _percent, True, 1),
    "hits@5": Measure("Hits@5 %", _percent, True, 1),
    "hits@10": Measure("Hits@10 %", _percent, True, 1),
    "mrr": Measure("MRR", _ratio, True),
    "ndcg@10": Measure("NDCG@10", _ratio, True),
    "user_rank": Measure("rank of the user", _ratio, False, 2),
    "user_first": Measure("user first %", _percent, True, 1),
    "f1": Measure("word F1 %", _percent, True, 1),
    "bleu": Measure("BLEU", bleu, True, 2),
    "rouge1": Measure("ROUGE-1 %", _percent, True, 1),
    "rouge2": Measure("ROUGE-2 %", _percent, True, 1),
    "rougeL": Measure("ROUGE-L %", _percent, True, 1),
    "rouge1_best": Measure("ROUGE-1 best %", _percent, True, 1),
    "rouge2_best": Measure("ROUGE-2 best %", _percent, True, 1),
    "rougeL_best": Measure("ROUGE-L best %", _percent, True, 1),
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Condition minus baseline, with a 95 % interval and the p value of a paired test."""

    mean: float
    low: float
    high: float
    p: float
    p_least: float  # that a test of so many users and permutations can give


def sums_by_user(groups: Sequence[np.ndarray], users: Sequence[str]) -> list[np.ndarray]:
    """[N, k] per record -> [U, k], for each group: two records of one user are not independent, and stay together.
    Records that add nothing were not measured, and their users have no part.
    """
    measured = np.any([statistics.any(axis=1) for statistics in groups], axis=0)
    names, owner = np.unique(np.asarray(users, str)[measured], return_inverse=True)
    out = []
    for statistics in groups:
        sums = np.zeros((len(names), statistics.shape[1]))
        np.add.at(sums, owner, statistics[measured])
        out.append(sums)
    return out


def blocks(samples: int, users: int) -> list[int]:
    """Sizes of the blocks that `samples` are drawn in, so that no block of weights [block, U] is large."""
    most = max(1, MOST // users)
    return [most] * (samples // most) + ([samples % most] if samples % most else [])


def bootstrap(groups: Sequence[np.ndarray], value: Callable[[np.ndarray], np.ndarray], samples: int) -> np.ndarray:
    """[samples, len(groups)]: values over users drawn with replacement, the same ones for every group [U, k]
    (Efron & Tibshirani, 1993).
    """
    rng, users = np.random.default_rng(0), len(groups[0])
    drawn = []
    for size in blocks(samples, users):
        counts = rng.multinomial(users, np.full(users, 1 / users), size=size)
        drawn.append(np.stack([value(counts @ sums) for sums in groups], axis=-1))
    return np.concatenate(drawn)


def permutation_p(
    a: np.ndarray, b: np.ndarray, value: Callable[[np.ndarray], np.ndarray], samples: int
) -> tuple[float, float]:
    """Two-sided p of "it does not matter which of the two a user gets": each user's sums [U, k] change sides, in every
    way there is where there are at most `samples` of them (Fisher, 1935), else at random (approximate randomisation;
    Noreen, 1989).

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


def interval(name: str, statistics: np.ndarray, users: Sequence[str], samples: int) -> tuple[float, float, float]:
    """A measure's value and its 95 % interval, a percentile bootstrap over users."""
    measure, (sums,) = MEASURES[name], sums_by_user([statistics], users)
    low, high = np.quantile(bootstrap([sums], measure.value, samples), [0.025, 0.975])
    return float(measure.value(sums.sum(axis=0))), float(low), float(high)


def difference(name: str, ours: np.ndarray, theirs: np.ndarray, users: Sequence[str], samples: int) -> Difference:
    """Of two conditions on the same records: paired bootstrap and paired permutation test, both over users.

    Args:
      name: of the measure.
      ours: [N, k] statistics.
      theirs: [N, k].
      users: N ids.
      samples: of bootstrap and test, each.
    """
    value = MEASURES[name].value
    a, b = sums_by_user([ours, theirs], users)
    drawn = bootstrap([a, b], value, samples)
    low, high = np.quantile(drawn[:, 0] - drawn[:, 1], [0.025, 0.975])
    mean = float(value(a.sum(axis=0)) - value(b.sum(axis=0)))
    return Difference(mean, float(low), float(high), *permutation_p(a, b, value, samples))
