"""How we measure: the contestants take turns in one process, and only ratios of neighbors in time are compared.

These machines are shared: a neighbor can slow everything two to ten times for minutes. A ratio taken within a pair
survives that; an absolute number does not. Medians of the pairs' ratios are what the docs quote.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# torch's own default counts physical cores, and leaves half of a small machine idle; on a busy one, one thread
# (OMP_NUM_THREADS=1) is fairer: two that wait for each other are slowed without measure, and one has a clock of its own
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1)
clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter


@dataclass(frozen=True)
class Row:
    """One contestant: its median seconds, and the median over the pairs of (reference's seconds / its seconds)."""

    name: str
    seconds: float
    times_reference: float
    low: float
    high: float


def race(contestants: Mapping[str, Callable[[], object]], *, pairs: int = 5, warm_up: int = 1) -> list[Row]:
    """Run all in turn, `pairs` times over; the first is the reference. Every second round goes backwards."""
    for run in list(contestants.values()) * warm_up:
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(pairs):
        order = list(contestants) if round_ % 2 == 0 else list(contestants)[::-1]
        for name in order:
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    reference = seconds[next(iter(contestants))]
    rows = []
    for name, mine in seconds.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(reference, mine, strict=True))
        rows.append(Row(name, statistics.median(mine), statistics.median(ratios), ratios[0], ratios[-1]))
    return rows


def table(rows: list[Row], work: float, unit: str) -> str:
    """Markdown: name, work per second, ratio to the reference with its range over the pairs."""
    lines = [f"| form | {unit} | times the reference (range) |", "| --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row.name} | {work / row.seconds:,.4g} | {row.times_reference:.2f} ({row.low:.2f}-{row.high:.2f}) |"
        )
    return "\n".join(lines)


def as_json(rows: list[Row]) -> str:
    return json.dumps([row.__dict__ for row in rows], indent=1)
