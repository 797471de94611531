"""Describes verdicts in words, and formats the rows of the live table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from llm_quest.experiments import sequential
from llm_quest.experiments.comparison import Comparison

PAIRING_HELPS = 1.3
"""A smaller pairing gain is reported."""


def describe_verdict(verdict: Mapping[str, Any]) -> list[str]:
    """A verdict in words: the sentence, the interval, how many pairs, and what would change it."""
    outcome = verdict["outcome"]
    words = outcome.replace("delta", f"{verdict['delta']:g}")
    if verdict["size"]:
        words += f", {verdict['size'].replace('delta', format(verdict['delta'], 'g'))}"
    lines = [f"{verdict['arm']}: {words}" + (f" ({verdict['reason']})" if verdict["reason"] else "")]
    interval = verdict["interval_95"]
    lines += describe_deciding_interval(verdict)
    if verdict["mean"] is not None:
        between = f"between {interval[0]:+.4g} and {interval[1]:+.4g} (95 %)" if interval else "not bounded yet"
        lines.append(
            f"  {verdict['metric']}, arm - control: {between}; mean {verdict['mean']:+.4g}, median "
            f"{verdict['median']:+.4g}; {len(verdict['differences'])} pairs, E = {describe_evidence(verdict)}"
        )
    if outcome == "undecided (time)":
        lines.append("  time ran out; the same command goes on")
    if outcome == "undecided (cap)" and interval:
        lines.append(f"  at most {max(map(abs, interval)):.3g} in either direction; more pairs need a new --first-seed")
    if (gain := verdict["pairing_gain"]) is not None and gain < PAIRING_HELPS:
        lines.append(
            f"  pairing did not help (gain {gain:.2g}): the runs of a pair vary like runs of different seeds; evaluate "
            "on more tokens, or let the learning rate fall further"
        )
    lines += [f"  {line}" for line in describe_stability(verdict)]
    return lines


def describe_evidence(verdict: Mapping[str, Any]) -> str:
    """The newest evidence beside its threshold; and the largest, which decides, where that alone reached it."""
    evidence, threshold = verdict["evidence"], verdict["threshold"]
    newest, largest = f"{evidence[-1]:.3g} of {threshold:.3g}", max(evidence)
    if evidence[-1] < threshold <= largest:
        return f"{newest}, which it had passed with {largest:.3g} after {evidence.index(largest) + 1} pairs"
    return newest


def describe_deciding_interval(verdict: Mapping[str, Any]) -> list[str]:
    """A line on the 90 % interval where it decided: two one-sided tests at 5 % (cards from before December
    2026 have none)."""
    interval = verdict.get("interval_90")
    if verdict.get("decided_by", "interval_90") != "interval_90" or not interval or "delta" not in verdict["outcome"]:
        return []
    return [
        f"  decided by the 90 % interval, {interval[0]:+.4g} to {interval[1]:+.4g}, beside delta {verdict['delta']:g} "
        "(two one-sided tests at 5 %); the 95 % interval may exceed delta"
    ]


def describe_stability(verdict: Mapping[str, Any]) -> list[str]:
    """Lines about the runs that diverged."""
    if verdict["diverged"] or verdict["control_diverged"]:
        return [
            f"diverged: {len(verdict['diverged'])} runs of the arm, {len(verdict['control_diverged'])} of the control, "
            f"of {verdict['pairs']}; the difference is of the pairs that finished"
        ]
    bound = verdict["divergence_bound"]
    return [] if bound is None else [f"no run of {verdict['pairs']} diverged (probability below {bound:.0%})"]


def pair_line(comparison: Comparison, name: str, seed: int) -> str:
    """A row of the live table: seed, difference, mean, its interval as a bar around 0, E against its threshold."""
    arm, claim = comparison.arms[name], comparison.claim
    d = arm.differences
    newest = f"{d[-1]:+.4f}" if arm.seeds and arm.seeds[-1] == seed else "diverged"
    low, high = sequential.sequential_interval(d, claim.cap)
    mean = f"{statistics.fmean(d):+.4f}" if d else "-"
    state = "" if arm.outcome == "open" else f"  {arm.outcome.replace('delta', f'{claim.delta:g}')}"
    value = f"E {arm.evidence[-1]:7.3g} of {comparison.threshold(name):.3g}" if arm.evidence else "E -"
    bar = interval_bar(low, high, claim.delta)
    return f"seed {seed:<4} {name:<20.20} {newest:>9}  mean {mean:>9}  {bar}  {value}{state}"


BAR_WIDTH = 25


def interval_bar(low: float, high: float, delta: float) -> str:
    """`----:--==|=----:----` between -3 delta and 3 delta: the interval in =, 0 at |, -delta and delta at the colons;
    an arrow where the whole interval lies outside."""
    span = 3 * delta
    places = [-span + 2 * span * (column + 0.5) / BAR_WIDTH for column in range(BAR_WIDTH)]
    cells = ["=" if low <= x <= high else "-" for x in places]
    for x, mark in ((-delta, ":"), (delta, ":"), (0.0, "|")):
        cells[min(BAR_WIDTH - 1, int((x + span) / (2 * span) * BAR_WIDTH))] = mark
    if low > span or high < -span:
        cells[-1 if low > span else 0] = ">" if low > span else "<"
    return "".join(cells)
