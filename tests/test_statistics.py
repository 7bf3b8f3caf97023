"""What is too slow for the cells of 07_statistics: coverage of the intervals over a grid of designs, and votes of benchmark size."""
import time
from itertools import product

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from gcpo.statistics import _combine, _seed_and_rest, avg_at_k, maj_at_k, paired_bootstrap, sign_flip

DIFFICULTY, CELL = 2.5, 0.5  # sd of logits between problems, and between seeds within a problem
SEEDS, PROBLEMS, SEED_POINTS, METHOD_SD = (3, 5, 10), (30, 164, 500), (0, 1, 2, 5), (0, 0.8)
GRID = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)


def slope(method_sd):
    "What one logit of a seed is worth in share of right answers, on average over problems."
    logit = GRID * np.sqrt(DIFFICULTY**2 + method_sd**2 / 2 + CELL**2) - 0.5
    return (expit(logit) * expit(-logit)).mean()


def experiments(rng, N, S, P, seed_points, method_sd, shift=0.0):
    "Binary scores of N experiments, two methods, [N, S, P] each, and the true difference of their means over problems and seeds."
    seed_sd = seed_points / 100 / slope(method_sd)
    hard = rng.normal(-0.5, DIFFICULTY, (N, 1, P))
    scores = []
    for sign in (0.5, -0.5):
        logit = hard + rng.normal(0, method_sd / np.sqrt(2), (N, 1, P)) + rng.normal(0, seed_sd, (N, S, 1)) + rng.normal(0, CELL, (N, S, P)) + sign * shift
        scores.append((rng.random((N, S, P)) < expit(logit)).astype(float))
    logit = GRID * np.sqrt(DIFFICULTY**2 + method_sd**2 / 2 + CELL**2 + seed_sd**2) - 0.5
    return *scores, (expit(logit + shift / 2) - expit(logit - shift / 2)).mean()


def coverage(rng, N, S, P, *how):
    "Share of the t intervals that hold the truth: what paired_bootstrap draws, in closed form."
    a, b, truth = experiments(rng, N, S, P, *how)
    d_N_P = a.mean(1) - b.mean(1)
    seed_M, rest_M = zip(_seed_and_rest(a), _seed_and_rest(b))
    variance, _, df = _combine(d_N_P.var(1, ddof=1) / P, seed_M, rest_M, P, (S, S))
    return (abs(d_N_P.mean(1) - truth) <= stats.t.ppf(0.975, df) * np.sqrt(variance)).mean()


@pytest.mark.parametrize("S", SEEDS)
def test_interval_covers_over_the_grid(S):
    "93 to 97%, give or take three standard errors of the simulation."
    rng, slack = np.random.default_rng(S), 3 * np.sqrt(0.05 * 0.95 / 1500)
    grid = [(30, sd, m, shift) for sd, m, shift in product(SEED_POINTS, METHOD_SD, (0.0, 0.6))] + [(164, sd, 0.8, 0.6) for sd in SEED_POINTS]
    found = {how: coverage(rng, 1500, S, *how) for how in grid}
    assert all(0.93 - slack < c < 0.97 + slack for c in found.values()), found
    assert 0.945 < np.mean(list(found.values())) < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("S, P", list(product(SEEDS, PROBLEMS)))
def test_interval_covers_over_the_whole_grid(S, P):
    rng, N = np.random.default_rng(S * P), 6000 if P < 500 else 3000
    found = {how: coverage(rng, N, S, P, *how) for how in product(SEED_POINTS, METHOD_SD, (0.0, 0.6))}
    slack = 3 * np.sqrt(0.05 * 0.95 / N)
    print(S, P, "min %.3f max %.3f" % (min(found.values()), max(found.values())))
    assert all(0.93 - slack < c < 0.97 + slack for c in found.values()), found


@pytest.mark.parametrize("S, P, seed_points, shift", [(3, 30, 0, 0.6), (3, 30, 5, 0.0), (5, 164, 2, 0.6), (1, 30, 0, 0.0)])
def test_draws_cover(S, P, seed_points, shift, N=1200):
    "The bootstrap's own interval, p-value and closed form agree; the p-value is below 5% as often as the interval misses zero."
    a, b, truth = experiments(np.random.default_rng(7), N, S, P, seed_points, 0.8, shift)
    found = [paired_bootstrap(x, y, seed=i, draws=1000) for i, (x, y) in enumerate(zip(a, b))]
    assert 0.93 - 0.019 < np.mean([d.low <= truth <= d.high for d in found]) < 0.97 + 0.015
    assert np.mean([(d.p_value < 0.05) == (d.low > 0 or d.high < 0) for d in found]) > 0.985
    ratio = [(d.high - d.low) / (2 * stats.t.ppf(0.975, d.df) * d.se) for d in found if d.se > 0]
    assert abs(np.median(ratio) - 1) < 0.03


def test_unequal_seeds_and_paired_seeds_cover(N=1200):
    rng = np.random.default_rng(11)
    a, _, _ = experiments(rng, N, 3, 164, 3, 0.8)
    more = paired = 0
    for i in range(N):
        hard = rng.normal(-0.5, DIFFICULTY, 164)
        shared = rng.normal(0, 0.4, (8, 1))
        x, y = (rng.random((8, 164)) < expit(hard + rng.normal(0, 0.6, 164) + shared)).astype(float), (rng.random((8, 164)) < expit(hard + rng.normal(0, 0.6, 164) + shared)).astype(float)
        d, e = paired_bootstrap(x, y, draws=500, paired_seeds=True), paired_bootstrap(x[:3], (rng.random((8, 164)) < expit(hard + rng.normal(0, 0.6, 164) + rng.normal(0, 0.4, (8, 1)))), draws=500)
        paired += d.low <= 0 <= d.high
        more += e.low <= 0 <= e.high
    assert 0.91 < paired / N < 0.985 and 0.91 < more / N < 0.985


def test_p_values_of_no_difference_are_uniform():
    a, b, _ = experiments(np.random.default_rng(3), 600, 1, 164, 0, 0.0)
    flips = np.array([sign_flip(x, y, draws=1000) for x, y in zip(a, b)])
    assert abs((flips < 0.1).mean() - 0.1) < 0.04 and (flips < 0.05).mean() < 0.075


def test_few_samples_cover_on_these_problems(N=1500):
    rng = np.random.default_rng(5)
    for P, K in ((30, 2), (100, 8)):
        p_P = expit(rng.normal(-0.5, DIFFICULTY, P))
        found = [avg_at_k(rng.binomial(1, p_P[:, None], (P, K))).these_problems for _ in range(N)]
        assert 0.93 < np.mean([low <= p_P.mean() <= high for low, high in found]) < 0.965


def test_votes_of_benchmark_size():
    "500 problems of 16 samples, and 30 of 64, in seconds; maj@n is the plain majority."
    rng, began = np.random.default_rng(0), time.perf_counter()
    for P, K in ((500, 16), (30, 64)):
        answers = rng.geometric(rng.uniform(0.1, 0.9, (P, 1)), (P, K))
        votes = maj_at_k(answers, answers == 1, K)
        counts = np.array([[(row == v).sum() for v in range(1, row.max() + 1)] + [0] * (answers.max() - row.max()) for row in answers])
        top = counts == counts.max(1, keepdims=True)
        assert np.allclose(votes, top[:, 0] / top.sum(1))
        assert (np.diff([maj_at_k(answers[:20], answers[:20] == 1, k).mean() for k in (1, 3, 5)]) > -0.05).all()
    assert time.perf_counter() - began < 20
