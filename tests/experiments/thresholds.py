"""`python -m tests.experiments.thresholds`: simulates THRESHOLDS of llm_quest/experiments/sequential.py (two million
experiments without an effect, 20 seconds on one core), prints them beside those of the package, and fails where one is
more than 2 % away."""

from __future__ import annotations

import sys

import numpy as np

from llm_quest.experiments.sequential import ALPHAS, FIRST_LOOK, THRESHOLDS, log_evidence

WALKS, AT_ONCE = 2_000_000, 100_000


def running_evidence(differences: np.ndarray) -> np.ndarray:
    """log E_n for n = FIRST_LOOK .. N of walks (walk, pair)."""
    n = np.arange(1, differences.shape[1] + 1)
    means = differences.cumsum(1) / n
    squares = (differences**2).cumsum(1) - n * means**2
    looks = slice(FIRST_LOOK - 1, None)
    t = np.sqrt(n[looks]) * means[:, looks] / np.sqrt(squares[:, looks] / (n[looks] - 1))
    return log_evidence(t, n[looks])


def main() -> int:
    draw = np.random.default_rng(20261129)
    largest: dict[int, list[np.ndarray]] = {cap: [] for cap in THRESHOLDS}
    for _ in range(WALKS // AT_ONCE):
        reached = np.maximum.accumulate(running_evidence(draw.standard_normal((AT_ONCE, max(THRESHOLDS)))), 1)
        for cap, found in largest.items():
            found.append(reached[:, cap - FIRST_LOOK])
    worst = 0.0
    for cap, found in largest.items():
        simulated = np.exp([np.quantile(np.concatenate(found), 1 - alpha) for alpha in ALPHAS])
        print(cap, " ".join(f"{value:.4g}" for value in simulated), "   package:", *THRESHOLDS[cap])
        worst = max(worst, float(np.abs(np.array(THRESHOLDS[cap]) / simulated - 1).max()))
    return int(worst > 0.02)


if __name__ == "__main__":
    sys.exit(main())
