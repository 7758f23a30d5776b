"""Metrics against brute force in rationals, and tests that keep the level they promise."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from search import metrics


def subsets(n, k):
    return list(itertools.combinations(range(n), k))


def brute(n, k, credit):
    chosen = subsets(n, k)
    return float(sum((credit(s) for s in chosen), Fraction(0)) / len(chosen))


def majority(labels, worth):
    def credit(subset):
        votes = [labels[i] for i in subset if labels[i] is not None]
        if not votes:
            return Fraction(0)
        most = max(votes.count(v) for v in votes)
        leaders = {v for v in votes if votes.count(v) == most}
        return sum((Fraction(worth[v]) for v in leaders), Fraction(0)) / len(leaders)

    return credit


def test_pass_at_k_equals_brute_force_in_rationals():
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                assert metrics.pass_at_k(n, correct, k) == brute(
                    n, k, lambda s, c=correct: Fraction(any(i < c for i in s))
                )


@pytest.mark.parametrize("seed", range(40))
def test_maj_at_k_equals_brute_force_in_rationals(seed):
    draw = random.Random(seed)
    n, classes = draw.randint(1, 9), draw.randint(1, 4)
    labels = [draw.choice([None, *range(classes)]) for _ in range(n)]
    worth = [draw.choice([0, 0, 1, 0.5]) for _ in range(classes)]
    counts = [labels.count(c) for c in range(classes)]
    for k in range(1, n + 1):
        expected = brute(n, k, majority(labels, worth))
        assert metrics.maj_at_k(counts, worth, k, blank=labels.count(None)) == expected


@pytest.mark.parametrize("seed", range(20))
def test_best_of_k_equals_brute_force_in_rationals(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 8)
    scores = [draw.choice([0.1, 0.5, 0.9]) for _ in range(n)]
    correct = [draw.randint(0, 1) for _ in range(n)]

    def credit(subset):
        best = max(scores[i] for i in subset)
        worths = [Fraction(correct[i]) for i in subset if scores[i] == best]
        return sum(worths, Fraction(0)) / len(worths)

    for k in range(1, n + 1):
        assert metrics.best_of_k(scores, correct, k) == brute(n, k, credit)


def test_maj_at_k_is_exact_at_the_size_of_an_evaluation():
    counts = [90, 80, 30, *[1] * 56]
    value = metrics.maj_at_k(counts, [1, *[0] * 58], 64)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    hits = []
    for _ in range(4000):
        votes = np.bincount(rng.choice(labels, 64, replace=False), minlength=len(counts))
        leaders = np.flatnonzero(votes == votes.max())
        hits.append((0 in leaders) / len(leaders))
    assert abs(value - np.mean(hits)) < 4 * np.std(hits) / math.sqrt(len(hits))


def test_unfinished_samples_never_vote():
    assert metrics.maj_at_k([1], [1], 3, blank=9) == pytest.approx(3 / 10)  # right whenever the one vote is drawn
    assert metrics.maj_at_k([0], [1], 2, blank=5) == 0.0


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_samples_is_named(k):
    with pytest.raises(ValueError, match=f"k={k} with n=3"):
        metrics.pass_at_k(3, 1, k)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        metrics.best_of_k([0.5, math.nan], [1, 0], 1)
    with pytest.raises(ValueError, match="NaN"):
        metrics.interval([0.5, math.nan])


def test_student_quantile_matches_the_printed_tables():
    for freedom, value in [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (29, 2.04523), (120, 1.97993)]:
        assert metrics.student_quantile(0.975, freedom) == pytest.approx(value, abs=2e-5)


def test_interval_of_all_wrong_keeps_its_width():
    got = metrics.interval([0.0] * 30)
    assert got.low == 0.0 and 0.08 < got.high < 0.15


def test_samples_of_one_task_do_not_narrow_the_interval():
    alone = metrics.interval([0, 1, 1, 0, 1])
    copied = metrics.interval([0, 1, 1, 0, 1] * 20, tasks=list("abcde") * 20)
    assert copied == alone


def test_interval_covers_at_its_level():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        rates = rng.beta(2, 2, size=25)  # tasks of unlike difficulty, 4 samples each
        values = (rng.random((25, 4)) < rates[:, None]).astype(float)
        got = metrics.interval(values.ravel(), tasks=np.repeat(np.arange(25), 4))
        covered += got.low <= 0.5 <= got.high
    assert covered / 400 > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 400)


def test_mcnemar_equals_the_binomial_by_hand():
    a, b = [1] * 7 + [0] * 1 + [1] * 5, [0] * 7 + [1] * 1 + [1] * 5
    assert metrics.mcnemar(a, b) == pytest.approx(2 * (1 + 8) / 256)
    assert metrics.mcnemar(a, b, mid=True) == pytest.approx((2 * 9 - 8) / 256)
    assert metrics.mcnemar([1, 0], [1, 0]) == 1.0
    with pytest.raises(ValueError, match="sign_flip"):
        metrics.mcnemar([0.5], [1])


def test_sign_flip_is_exact_for_few_tasks_and_sampled_for_many():
    d = [0.5, 0.25, -0.1, 0.4]
    flips = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((-1, 1), repeat=4)]
    assert metrics.sign_flip(d) == sum(f >= abs(sum(d)) - 1e-12 for f in flips) / 16
    assert metrics.sign_flip([1.0] * 40, rounds=999) == 1 / 1000
    assert metrics.sign_flip([0.0] * 5) == 1.0


def test_paired_tests_keep_their_level_when_nothing_differs():
    rng = np.random.default_rng(2)
    low = sum(metrics.sign_flip(rng.normal(size=20), seed=i, rounds=500) < 0.05 for i in range(400))
    assert low < 400 * 0.05 + 4 * math.sqrt(400 * 0.05 * 0.95)


def test_bootstrap_interval_covers_a_skewed_difference():
    rng = np.random.default_rng(3)
    covered = 0
    for i in range(200):
        low, high = metrics.paired_bootstrap(rng.exponential(size=40) - 1.0, seed=i, rounds=400)
        covered += low <= 0 <= high
    assert 0.87 < covered / 200 < 0.99


def test_holm_is_monotone_and_capped():
    assert metrics.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert metrics.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_resolvable_difference_follows_the_discordance():
    d = np.zeros(500)
    d[:25], d[25:50] = 1, -1  # one task in ten discordant
    assert metrics.resolvable(d) == pytest.approx(2.8016 * math.sqrt(0.1 / 500), rel=1e-3)
    assert metrics.resolvable(np.zeros(30)) == 6 / 30


def test_comparison_needs_the_same_tasks():
    with pytest.raises(ValueError, match="'t2'"):
        metrics.compare({"t1": 1, "t2": 0}, {"t1": 1})
    got = metrics.compare({f"t{i}": 1.0 for i in range(8)}, {f"t{i}": 0.0 for i in range(8)})
    assert got.difference == 1.0 and got.p == 2 / 256 and got.test == "exact McNemar" and got.discordant == 8
