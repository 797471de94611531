"""Accuracy of methods that choose one of k samples: the majority's answer (self-consistency, Wang et al. 2022,
arXiv:2203.11171), and the sample that a reward model likes best (best-of-k, Stiennon et al. 2020, arXiv:2009.01325).

Both are estimated from n >= k samples without bias, as pass@k is: the mean over all subsets of k samples, counted and
not drawn. Commonly got wrong: the vote of the first k samples alone, which throws the others away; and ties that go to
the answer that came first."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from llm_quest.errors import UsageError

Vote = tuple[Hashable | None, float]
"""A sample's answer (None: it has none), and whether it is right: 1 or 0."""


def majority_at_k(k: int, votes: Sequence[Vote]) -> float:
    """The probability that the commonest answer among k of these samples is right. Samples without an answer don't
    vote; ties are broken by chance; where nobody votes, the answer is wrong."""
    require_enough(k, len(votes))
    counts: dict[Hashable, int] = {}
    for answer, _ in votes:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    silent = len(votes) - sum(counts.values())
    right = {answer for answer, worth in votes if worth > 0 and answer is not None}
    ways = sum(ways_to_win(answer, k, counts, silent) for answer in right)
    return ways / math.comb(len(votes), k)


def ways_to_win(answer: Hashable, k: int, counts: dict[Hashable, int], silent: int) -> float:
    """The number of subsets of k in which this answer wins; one that it shares with j others counts 1/(j+1)."""
    others = [count for other, count in counts.items() if other != answer]
    total = 0.0
    for top in range(1, min(k, counts[answer]) + 1):
        subsets = subsets_of_others(top, k - top, others, silent)
        shares = 1.0 / np.arange(1, len(subsets) + 1)
        total += math.comb(counts[answer], top) * float(shares @ subsets[:, k - top])
    return total


def subsets_of_others(top: int, size: int, others: Sequence[int], silent: int) -> np.ndarray:
    """(ties + 1, size + 1): how many subsets of so many of the other samples hold no answer more than `top` times, and
    so many answers just as often."""
    table = np.zeros((size // top + 1, size + 1))
    table[0] = [math.comb(silent, taken) for taken in range(size + 1)]
    for count in others:
        grown = np.zeros_like(table)
        for taken in range(min(count, top, size) + 1):
            ways = math.comb(count, taken) * table[:, : size + 1 - taken]
            if taken == top:
                grown[1:, taken:] += ways[:-1]
            else:
                grown[:, taken:] += ways
        table = grown
    return table


def best_of_at_k(k: int, scored: Sequence[tuple[float, float]]) -> float:
    """The probability that the best rewarded of k of these samples is right. scored: (reward, 1 or 0) of each; equal
    rewards share the choice."""
    n = len(scored)
    require_enough(k, n)
    order = sorted(range(n), key=lambda i: scored[i][0])
    chosen = [math.comb(rank, k - 1) / math.comb(n, k) for rank in range(n)]  # the best is the one of this rank
    total = 0.0
    for reward in {value for value, _ in scored}:
        ranks = [rank for rank, i in enumerate(order) if scored[i][0] == reward]
        worth = sum(scored[order[rank]][1] for rank in ranks) / len(ranks)
        total += worth * sum(chosen[rank] for rank in ranks)
    return total


def require_enough(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise UsageError(f"a choice among {k} needs at least so many samples of each problem; there are {n}")


def selection_sizes(largest: int) -> list[int]:
    """The numbers of samples that are reported: powers of four below the largest, and the largest."""
    return [k for k in (1, 4, 16, 64, 256) if k < largest] + [largest] if largest else []
