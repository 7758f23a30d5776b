"""What n judged samples per task say about k, and whether two methods really differ.

pass@k, maj@k and best-of-k are expectations over all k-subsets of the n samples, computed exactly in integers
(no bootstrap). Intervals treat the task as the cluster: samples of one task are not independent. Knows nothing of
paths or models: numbers in, numbers out. Neighbour: `marginal.at_k` does the same for weighted votes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its two-sided interval. `tasks` is the number of clusters behind it."""

    mean: float
    low: float
    high: float
    error: float  # standard error of `mean`
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Method a against method b on the same tasks. `resolvable`: the smallest difference these tasks can show."""

    difference: float
    low: float  # of the 95% paired bootstrap interval
    high: float
    p: float
    test: str  # "exact McNemar" or "sign flip"
    tasks: int
    discordant: int  # tasks on which the two differ
    resolvable: float


# -- expectations over k-subsets ------------------------------------------------------------------------------------


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of the n samples hold a correct one: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    _check_k(n, k)
    if not 0 <= correct <= n:
        raise ValueError(f"correct={correct} of n={n} samples: it must lie in 0..n")
    return float(1 - Fraction(math.comb(n - correct, k), math.comb(n, k)))


def maj_at_k(counts: Sequence[int], correct: Sequence[float], k: int, blank: int = 0) -> float:
    """Expected accuracy of the majority of k samples. Ties share the credit.

    counts: samples in each answer class; correct: worth of each class in [0, 1]; blank: samples without a vote
    (unfinished, or no answer found). A subset without any vote earns 0.
    """
    if len(counts) != len(correct):
        raise ValueError(f"{len(counts)} counts but {len(correct)} values of correct: give one for each class")
    n = sum(counts) + blank
    _check_k(n, k)
    total = Fraction(0)
    for winner, worth in enumerate(correct):
        if worth:
            others = [count for i, count in enumerate(counts) if i != winner]
            total += Fraction(worth) * _wins(counts[winner], others, k, blank)
    return float(total / math.comb(n, k))


def _wins(own: int, others: Sequence[int], k: int, blank: int) -> Fraction:
    """Number of k-subsets that a class of `own` samples wins; one shared with t others counts 1 / (1 + t)."""
    total = Fraction(0)
    for votes in range(1, min(own, k) + 1):
        room = k - votes
        # ways[t][s]: choices of s samples of the other classes, none above `votes`, t of them equal to it.
        # Classes too small to tie need no bookkeeping: together they are one pool.
        pool = blank + sum(c for c in others if c < votes)
        ways = {0: [math.comb(pool, s) for s in range(room + 1)]}
        for count in (c for c in others if c >= votes):
            grown: dict[int, list[int]] = {}
            choices = [math.comb(count, x) for x in range(votes + 1)]
            for ties, row in ways.items():
                for x, weight in enumerate(choices):
                    target = grown.setdefault(ties + (x == votes), [0] * (room + 1))
                    for s in range(room + 1 - x):
                        target[s + x] += row[s] * weight
            ways = {ties: row for ties, row in grown.items() if any(row)}
        total += math.comb(own, votes) * sum(Fraction(row[room], 1 + ties) for ties, row in ways.items())
    return total


def best_of_k(scores: Sequence[float], correct: Sequence[float], k: int) -> float:
    """Expected worth of the best-scored of k samples (Hosseini et al. 2024). Equal scores share the credit."""
    n = len(scores)
    if n != len(correct):
        raise ValueError(f"{n} scores but {len(correct)} values of correct: give one for each sample")
    _check_k(n, k)
    if any(math.isnan(s) for s in scores):
        raise ValueError("a score is NaN: leave samples out that the scorer could not judge")
    groups: dict[float, list[float]] = {}
    for score, worth in zip(scores, correct, strict=True):
        groups.setdefault(score, []).append(worth)
    total, left = Fraction(0), n
    for score in sorted(groups, reverse=True):
        worths = groups[score]
        ways = math.comb(left, k) - math.comb(left - len(worths), k)  # subsets whose best lies in this group
        total += ways * sum(map(Fraction, worths), Fraction(0)) / len(worths)
        left -= len(worths)
    return float(total / math.comb(n, k))


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} with n={n} samples: k must lie in 1..n, so draw at least {k} samples")


# -- intervals ------------------------------------------------------------------------------------------------------


def interval(
    values: Sequence[float], tasks: Sequence[Hashable] | None = None, *, level: float = 0.95, unit: bool = True
) -> Interval:
    """Mean over tasks of the task means, with an interval clustered by task.

    values: one number per sample; tasks: the task of each (default: every value is its own task). Every task weighs
    the same. unit=True is for values in [0, 1]: Wilson's interval at the effective sample size, which stays honest at
    0 and 1 where the plain one has no width. unit=False (differences, tokens) is Student's.
    """
    means = np.array(_task_means(values, tasks))
    count, mean = len(means), float(means.mean())
    error = float(means.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    z = student_quantile(0.5 + level / 2, count - 1) if count > 1 else math.inf
    if not unit:
        reach = z * error if count > 1 else math.inf
        return Interval(mean, mean - reach, mean + reach, error, count)
    if means.min() < 0 or means.max() > 1:
        raise ValueError(f"values span [{means.min():g}, {means.max():g}], outside [0, 1]: pass unit=False")
    if count == 1:
        return Interval(mean, 0.0, 1.0, error, 1)
    effective = max(1.0, mean * (1 - mean) / error**2) if error > 0 else float(count)
    low, high = wilson(mean, effective, z)
    return Interval(mean, low, high, error, count)


def wilson(mean: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval for a proportion seen on n (possibly fractional) independent draws."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, min(centre - reach, mean)), min(1.0, max(centre + reach, mean))


@lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by bisection of its distribution (Abramowitz & Stegun 26.7.3-4)."""
    assert 0.5 < probability < 1 and freedom >= 1
    if freedom > 500:  # differs from the normal by less than 0.3% of the width
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * i / (i + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + inside / 2


def _task_means(values: Sequence[float], tasks: Sequence[Hashable] | None) -> list[float]:
    if not len(values):
        raise ValueError("no values: an interval needs at least one task")
    if any(math.isnan(v) for v in values):
        raise ValueError("a value is NaN: leave samples out that could not be judged, and count them")
    if tasks is None:
        return [float(v) for v in values]
    if len(tasks) != len(values):
        raise ValueError(f"{len(values)} values but {len(tasks)} tasks: name the task of every value")
    grouped: dict[Hashable, list[float]] = {}
    for value, task in zip(values, tasks, strict=True):
        grouped.setdefault(task, []).append(value)
    return [math.fsum(group) / len(group) for group in grouped.values()]


# -- paired tests ---------------------------------------------------------------------------------------------------


def compare(a: Mapping[str, float], b: Mapping[str, float], *, seed: int = 0, rounds: int = 10_000) -> Comparison:
    """Method a minus method b, each a mapping from task id to the expected score there (0/1, or exact maj@k ...)."""
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise ValueError(f"{len(odd)} tasks were run by one method only, e.g. {odd[0]!r}: compare on the same tasks")
    order = sorted(a)
    left, right = [float(a[t]) for t in order], [float(b[t]) for t in order]
    differences = np.subtract(left, right)
    single = {*left, *right} <= {0.0, 1.0}
    p = mcnemar(left, right) if single else sign_flip(differences, seed=seed, rounds=rounds)
    low, high = paired_bootstrap(differences, seed=seed, rounds=rounds)
    return Comparison(
        difference=float(differences.mean()),
        low=low,
        high=high,
        p=p,
        test="exact McNemar" if single else "sign flip",
        tasks=len(order),
        discordant=int(np.count_nonzero(differences)),
        resolvable=resolvable(differences),
    )


def mcnemar(a: Sequence[float], b: Sequence[float], *, mid: bool = False) -> float:
    """Exact two-sided McNemar p for two methods with one answer per task; `mid` gives the mid-p variant."""
    if not {*a, *b} <= {0, 1} or len(a) != len(b):
        raise ValueError("McNemar needs one 0 or 1 per task from both methods: use sign_flip for fractions")
    wins = sum(x > y for x, y in zip(a, b, strict=True))
    losses = sum(x < y for x, y in zip(a, b, strict=True))
    n, few = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, i) for i in range(few + 1))
    p = Fraction(2 * tail, 2**n) - (Fraction(math.comb(n, few), 2**n) if mid else 0)
    return float(min(Fraction(1), p))


def sign_flip(differences: Sequence[float], *, seed: int = 0, rounds: int = 10_000) -> float:
    """Two-sided p of the mean difference under random signs. Exact when at most 14 tasks differ, else sampled."""
    moved = np.asarray([d for d in differences if d])
    if not len(moved):
        return 1.0
    seen = abs(moved.sum()) - 1e-12
    if len(moved) <= 14:
        bits = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ moved) >= seen))
    random = np.random.default_rng(seed)
    hits = 0
    for start in range(0, rounds, 1000):  # in slices: rounds x tasks need not fit in memory
        signs = 2 * random.integers(0, 2, size=(min(1000, rounds - start), len(moved)), dtype=np.int8) - 1
        hits += int(np.count_nonzero(np.abs(signs @ moved) >= seen))
    return (1 + hits) / (1 + rounds)  # the observed signs are one of the draws: p is never 0


def paired_bootstrap(
    differences: Sequence[float], *, seed: int = 0, rounds: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """BCa interval of the mean difference, resampling tasks (Efron 1987)."""
    d = np.asarray(differences, dtype=float)
    if not len(d):
        raise ValueError("no tasks to compare")
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0])
    random = np.random.default_rng(seed)
    slices = [min(1000, rounds - start) for start in range(0, rounds, 1000)]  # rounds x tasks need not fit in memory
    means = np.concatenate([d[random.integers(0, len(d), (size, len(d)))].mean(1) for size in slices])
    normal = NormalDist()
    below = (np.count_nonzero(means < d.mean()) + np.count_nonzero(means == d.mean()) / 2) / rounds
    bias = normal.inv_cdf(min(max(below, 1 / rounds), 1 - 1 / rounds))
    centred = d.mean() - d  # jackknife means minus their mean, up to a factor that cancels
    skew = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))
    ends = []
    for tail in (0.5 - level / 2, 0.5 + level / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(float(np.quantile(means, normal.cdf(bias + z / (1 - skew * z)))))
    return ends[0], ends[1]


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: compare each with the level to keep the chance of any false claim below it."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: (p[name], name))):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def resolvable(differences: Sequence[float]) -> float:
    """Smallest true mean difference found with 80% power at the 5% level: (1.96 + 0.84) standard errors.

    Never below 6 / tasks: with fewer than six discordant tasks no exact paired test reaches 5%.
    """
    d = np.asarray(differences, dtype=float)
    spread = float(np.sqrt((d**2).mean() / len(d)))  # under no difference the mean square is the variance
    return min(1.0, max((NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) * spread, 6 / len(d)))
