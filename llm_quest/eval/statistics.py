"""Statistics of accuracy: Wilson confidence intervals, pass@k and mean@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_quest.errors import UsageError

Z95 = 1.959963984540054


@dataclass(frozen=True)
class ConfidenceInterval:
    """A share and its 95 % Wilson interval (Wilson 1927)."""

    share: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.share:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson_confidence_interval(num_correct: int, count: int, z: float = Z95) -> ConfidenceInterval:
    """The Wilson interval of a share. Unlike the normal interval it stays within 0..1 and has a width at 0 and at 1."""
    if count < 1:
        raise UsageError("a share of nothing has no interval: evaluate at least one problem")
    share, square = num_correct / count, z * z
    center = (share + square / (2 * count)) / (1 + square / count)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return ConfidenceInterval(share, max(0.0, center - half), min(1.0, center + half), count)


def pass_at_k(k: int, num_samples: int, num_correct: int) -> float:
    """1 - C(n-c, k) / C(n, k): the probability that at least one of k samples is right, estimated without bias from
    n >= k samples of which c are right (Chen et al. 2021, arXiv:2107.03374, eq. 1). Commonly got wrong:
    1 - (1 - c/n)^k, which is biased downwards: (1 - x)^k is convex, so its mean over the estimates c/n is too
    large."""
    if k > num_samples:
        raise UsageError(f"pass@{k} needs at least {k} samples of each problem; there are {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_pass_at_k(k: int, scores: Sequence[Sequence[float]]) -> float:
    """pass@k, averaged over problems. scores: of each problem's samples; NaN (could not be scored) is left out."""
    shares = []
    for samples in scores:
        known = [score for score in samples if not math.isnan(score)]
        if len(known) >= k:
            shares.append(pass_at_k(k, len(known), sum(score > 0 for score in known)))
    return sum(shares) / len(shares) if shares else math.nan


def mean_at_k(scores: Sequence[Sequence[float]]) -> float:
    """mean@k: the share of right samples of each problem, averaged over problems."""
    return mean_pass_at_k(1, scores)
