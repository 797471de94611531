"""Tunes the learning rates of all arms equally: the same number of rates on the same seeds, which are never reported.

The grid is wide (two octaves apart) and each rate is repeated; the rate that is used is the vertex of the parabola
through the best point and its neighbors in log2(rate). While the best rate of any arm lies at the edge of its grid,
every arm gets one more: beyond its edge, or beside its best one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GRID_FACTOR = 4.0
MAX_EXTENSIONS = 3
STEEPEST_RATE = -0.5
LARGEST_RATE = 1.0
"""What the recipes' `learning_rate` takes."""


@dataclass
class RateSearch:
    """The rates of an arm: rate -> mean loss over the tuning seeds (lower is better; infinite if one diverged)."""

    losses: dict[float, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda rate: (self.losses[rate], rate))

    @property
    def at_edge(self) -> bool:
        rates = sorted(self.losses)
        return len(rates) > 1 and self.best in (rates[0], rates[-1])

    def next_rate(self) -> float:
        """The rate to try next: beyond the edge, or between the best and the better of its neighbors."""
        rates = sorted(self.losses)
        place = rates.index(self.best)
        if place == 0:
            return round_rate(rates[0] / GRID_FACTOR)
        if place == len(rates) - 1 and rates[-1] * GRID_FACTOR <= LARGEST_RATE:
            return round_rate(rates[-1] * GRID_FACTOR)
        sides = [rates[i] for i in (place - 1, place + 1) if i < len(rates)]
        return round_rate(math.sqrt(self.best * min(sides, key=lambda rate: self.losses[rate])))

    def choose(self) -> float:
        """The vertex of the parabola, within the neighbors of the best rate."""
        rates = sorted(self.losses)
        place = rates.index(self.best)
        around = rates[max(0, place - 1) : place + 2]
        if len(around) < 3 or not all(math.isfinite(self.losses[rate]) for rate in around):
            return self.best
        vertex = parabola_vertex([math.log2(rate) for rate in around], [self.losses[rate] for rate in around])
        return round_rate(2.0 ** min(max(vertex, math.log2(around[0])), math.log2(around[-1])))


def parabola_vertex(x: Sequence[float], y: Sequence[float]) -> float:
    """The minimum of the parabola through three points of which the middle one is the lowest."""
    left, right = (x[1] - x[0]), (x[1] - x[2])
    a, b = left * (y[1] - y[2]), right * (y[1] - y[0])
    return x[1] if a == b else x[1] - 0.5 * (left * a - right * b) / (a - b)


def round_rate(rate: float) -> float:
    """Three digits: a rate that can be read and typed."""
    return float(f"{rate:.3g}")


def first_grid(center: float, count: int) -> list[float]:
    """`count` rates around the recipe's own."""
    middle = (count - 1) / 2
    rates = [center * GRID_FACTOR ** (number - math.floor(middle)) for number in range(count)]
    return [round_rate(rate) for rate in rates if rate <= LARGEST_RATE] or [center]


def needs_extension(searches: Mapping[str, RateSearch], count: int) -> bool:
    """Whether every arm gets one more rate. count: of the first grid."""
    tried = max(len(search.losses) for search in searches.values())
    return tried < count + MAX_EXTENSIONS and any(search.at_edge for search in searches.values())


def describe_search(name: str, search: RateSearch) -> str:
    """The rates of an arm on one line."""
    chosen = search.choose()
    between = "" if chosen in search.losses else " (between the rates: the vertex of the parabola through the best)"
    points = "  ".join(f"{rate:g}: {search.losses[rate]:.4g}" for rate in sorted(search.losses))
    return (
        f"{name}: learning_rate {chosen:g}{between}{' (at the edge of its rates)' if search.at_edge else ''}   {points}"
    )


def carry_rate(n: float, tuned: Mapping[float, float]) -> float:
    """The rate of a size: on the power law through the first and the last tuned size (size -> rate). A run of a larger
    size is longer too, and its best rate lower: the exponent is at most 0, and at least -1/2."""
    first, last = min(tuned), max(tuned)
    if first == last:
        return tuned[first]
    slope = math.log(tuned[last] / tuned[first]) / math.log(last / first)
    return round_rate(tuned[first] * (n / first) ** min(0.0, max(STEEPEST_RATE, slope)))
