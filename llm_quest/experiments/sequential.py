"""Sequential statistics of paired differences: tests and intervals that are valid after every pair.

d_1 .. d_n are the differences arm - control of n pairs, m and s their mean and standard deviation (n - 1), t = sqrt(n)
m / s. The evidence is the Bayes factor of t with a normal prior of variance 1 on effect / sigma (Lai 1976; Wang and
Ramdas 2023, arXiv:2310.03722), with r = 1 + n and nu = n - 1:

    E_n = r^(-1/2) [ (1 + t^2 / nu) / (1 + t^2 / (nu r)) ]^(n/2)

Without an effect E is a non-negative martingale of mean 1 whatever sigma is, so P(E ever reaches K) <= 1 / K. With at
most `cap` pairs a smaller K has the same error rate, because the t's have one joint law whatever sigma is: THRESHOLDS,
simulated by `python -m tests.experiments.thresholds`.

Commonly got wrong: Student's test after every pair, which by 12 pairs has found an effect that is not there in 18 % of
experiments, by 30 in 26 %."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FIRST_LOOK = 4
"""Pairs before the first look."""
ALPHAS = (0.1, 0.05, 0.025, 0.05 / 3, 0.0125, 0.01, 0.05 / 6, 0.05 / 8)
THRESHOLDS: Mapping[int, Sequence[float]] = {
    8: (3.33, 5.70, 9.08, 11.9, 14.5, 16.8, 18.9, 22.7),
    12: (4.01, 7.05, 12.0, 16.5, 20.6, 24.4, 27.9, 34.8),
    16: (4.43, 7.91, 14.0, 19.6, 24.7, 29.5, 34.4, 43.7),
    20: (4.74, 8.55, 15.5, 21.9, 27.7, 33.6, 39.4, 50.3),
    30: (5.22, 9.60, 17.9, 25.5, 33.0, 40.3, 47.4, 61.5),
}
"""Largest number of pairs -> K for each of ALPHAS."""
SIGN_THRESHOLD = 10.0
"""What the sign-symmetric evidence must reach as well, where differences are not normal (accuracies, rewards)."""
SIGN_RATES = np.array([0.5, 1.0, 2.0, 4.0])


def evidence_threshold(cap: int, alpha: float = 0.05) -> float:
    """K: without an effect E reaches it within `cap` pairs with probability alpha. Between ALPHAS it is interpolated in
    logarithms; below the last one it is 1 / alpha, which holds for every cap. KeyError for a cap without a row."""
    row = THRESHOLDS[cap]
    if alpha < ALPHAS[-1]:
        return 1 / alpha
    return float(np.exp(np.interp(math.log(alpha), np.log(ALPHAS[::-1]), np.log(row[::-1]))))


def log_evidence(t: Any, n: Any) -> Any:
    """log E_n of a t statistic of n pairs (n >= 2), elementwise. t may be infinite."""
    n = np.asarray(n, dtype=float)
    squared, r = np.square(np.asarray(t, dtype=float)) / (n - 1), 1 + n
    with np.errstate(invalid="ignore"):
        growth = np.log1p(squared) - np.log1p(squared / r)
    growth = np.where(np.isinf(squared), np.log(r), growth)
    return -0.5 * np.log(r) + n / 2 * growth


def t_statistic(differences: Sequence[float]) -> float:
    """sqrt(n) m / s; 0 where all differences are 0, infinite where all are equal and not 0."""
    values = np.asarray(differences, dtype=float)
    mean, deviation = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    if deviation == 0.0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return math.sqrt(len(values)) * mean / deviation


def evidence(differences: Sequence[float]) -> float:
    """E_n of the differences so far; 1 (nothing is known) for fewer than two pairs or for arms that are identical."""
    if len(differences) < 2 or not any(differences):
        return 1.0
    return float(np.exp(log_evidence(t_statistic(differences), len(differences))))


def interval_factor(n: Any, threshold: Any) -> Any:
    """c such that m -+ c s / sqrt(n) holds every effect whose evidence against it is below the threshold, elementwise:
    the |t| at which E_n is the threshold; infinite where no t reaches it (few pairs)."""
    n = np.asarray(n, dtype=float)
    r = 1 + n
    c = (r * np.square(threshold)) ** (1 / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.sqrt((n - 1) * (c - 1) / (1 - c / r))
    return np.where(c >= r, np.inf, factor)


def sequential_interval(differences: Sequence[float], cap: int, alpha: float = 0.05) -> tuple[float, float]:
    """The interval of the mean difference that covers it with probability 1 - alpha at all looks together."""
    n = len(differences)
    if n < 2:
        return -math.inf, math.inf
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if deviation == 0.0:
        return (mean, mean) if n >= FIRST_LOOK else (-math.inf, math.inf)
    half = float(interval_factor(n, evidence_threshold(cap, alpha))) * deviation / math.sqrt(n)
    return mean - half, mean + half


def sign_evidence(differences: Any) -> Any:
    """The sign-symmetric e-process (de la Pena 1999): the mean over l in +-{0.5, 1, 2, 4} of prod_i exp(l z_i) /
    cosh(l z_i), z_i = d_i / the root mean square of d_1 .. d_i. It needs no normal differences: without an effect each
    d_i is as probable as -d_i, since swapping the labels of the arms changes nothing. differences: (..., n)."""
    d = np.asarray(differences, dtype=float)
    scale = np.sqrt(np.cumsum(d**2, axis=-1) / np.arange(1, d.shape[-1] + 1))
    z = np.divide(d, scale, out=np.zeros_like(d), where=scale > 0)
    rates = np.concatenate([SIGN_RATES, -SIGN_RATES])
    exponents = np.stack([rate * z.sum(-1) - np.log(np.cosh(rate * z)).sum(-1) for rate in rates])
    return np.exp(exponents).mean(0)


def stability_evidence(against: int, discordant: int) -> float:
    """E that an arm diverges more often than the control: of `discordant` pairs in which one of the two diverged, in
    `against` it was the arm. E = 2 int_{1/2}^1 (2p)^k (2 - 2p)^(n-k) dp, in closed form."""
    k, n = against, discordant
    tail = sum(math.comb(n + 1, j) for j in range(k + 1))
    return tail / ((n + 1) * math.comb(n, k))


def divergence_bound(started: int, alpha: float = 0.05) -> float:
    """The largest probability of divergence at which none in `started` runs is not yet improbable (alpha)."""
    return 1 - alpha ** (1 / started)


def holm_rejections(largest: Mapping[str, float], cap: int, alpha: float = 0.05) -> set[str]:
    """Arms with an effect, by the running maximum of their evidence, such that any false one among them occurs with
    probability alpha at most (Holm 1979): the largest needs K(alpha / k), the next K(alpha / (k - 1)), and so on."""
    rejected: set[str] = set()
    for place, name in enumerate(sorted(largest, key=lambda arm: -largest[arm])):
        if largest[name] < evidence_threshold(cap, alpha / (len(largest) - place)):
            break
        rejected.add(name)
    return rejected


def pairing_gain(arm: Sequence[float], control: Sequence[float]) -> float:
    """(variance of the arm + variance of the control) / variance of the differences: how many times as many pairs an
    unpaired comparison would need. Below about 1.3 pairing did not help."""
    differences = np.subtract(arm, control)
    spread = float(differences.var(ddof=1))
    return float(np.var(arm, ddof=1) + np.var(control, ddof=1)) / spread if spread else math.inf
