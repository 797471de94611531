"""Tunes the learning rates of all arms equally: the same number of rates on the same seeds, which are never reported.

The grid is wide (two octaves apart) and each rate is repeated; the rate that is used is the vertex of the parabola
through the best point and its neighbors in log2(rate). Every arm gets one more rate, beyond the edge of its grid or
beside its best one, while a best one lies at the edge, or the vertex far from the best one: then either the minimum is
there, or one side is no parabola, as with a rate at which training collapses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GRID_FACTOR = 4.0
MAX_EXTENSIONS = 3
STEEPEST_RATE = -0.5
LARGEST_RATE = 1.0
"""What the recipes' `learning_rate` takes."""
NEAR = 0.25
"""The vertex is used within this share of the way from the best rate to its neighbor."""
OCTAVE = 1.1
"""One octave, and what rounding to three digits may add."""


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

    @property
    def neighbors(self) -> list[float]:
        """The rates below and above the best one: one of them at the edge, none of a single rate."""
        rates = sorted(self.losses)
        place = rates.index(self.best)
        return [rates[i] for i in (place - 1, place + 1) if 0 <= i < len(rates)]

    def octaves(self, rate: float) -> float:
        """The distance of a rate from the best one, in octaves."""
        return abs(math.log2(rate / self.best))

    @property
    def vertex(self) -> float:
        """The minimum of the parabola: log2 of a rate; the best rate's where a neighbor is missing or diverged."""
        around = sorted([self.best, *self.neighbors])
        if len(around) < 3 or not all(math.isfinite(self.losses[rate]) for rate in around):
            return math.log2(self.best)
        return parabola_vertex([math.log2(rate) for rate in around], [self.losses[rate] for rate in around])

    @property
    def vertex_range(self) -> tuple[float, float]:
        """Where a vertex is used, in log2(rate)."""
        ends = [math.log2(self.best) + NEAR * math.log2(rate / self.best) for rate in self.neighbors]
        return min(ends), max(ends)

    @property
    def is_open(self) -> bool:
        """Whether one more rate would say where the best one is: beyond the edge, or between it and a neighbor that is
        more than an octave away."""
        if self.at_edge:
            return True
        if not any(self.octaves(rate) > OCTAVE for rate in self.neighbors):
            return False
        low, high = self.vertex_range
        return not low <= self.vertex <= high or any(math.isinf(self.losses[rate]) for rate in self.neighbors)

    def next_rate(self) -> float:
        """The rate to try next: beyond the edge, or between the best one and a neighbor: the farther one, of two at
        the same distance the better one."""
        rates = sorted(self.losses)
        if self.best == rates[0]:
            return round_rate(rates[0] / GRID_FACTOR)
        if self.best == rates[-1] and rates[-1] * GRID_FACTOR <= LARGEST_RATE:
            return round_rate(rates[-1] * GRID_FACTOR)
        side = min(self.neighbors, key=lambda rate: (-round(self.octaves(rate), 1), self.losses[rate]))
        return round_rate(math.sqrt(self.best * side))

    def choose(self) -> float:
        """The vertex of the parabola, near the best rate; the best rate where there is none."""
        if len(self.neighbors) < 2:
            return self.best
        low, high = self.vertex_range
        vertex = min(max(self.vertex, low), high)
        return self.best if vertex == math.log2(self.best) else round_rate(2.0**vertex)


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
    return tried < count + MAX_EXTENSIONS and any(search.is_open for search in searches.values())


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
