"""Compares arms with a control, pair by pair, until each has a verdict.

`Comparison.add_pair` takes the measurements of one seed, in the order of the seeds; after each pair every open arm is

    better, worse                  E reached its threshold (with several arms: Holm's), and where differences are not
                                   normal the sign-symmetric evidence reached 10 as well
    worse: it diverges             more often than the control (e-value at least 20)
    no difference larger than delta   the 90 % interval lies within (-delta, delta)
    undecided (cap)                at the largest number of pairs
    undecided (time)               where time ran out first; the same command goes on

and takes part in no further pair once decided. A run that diverges is an outcome of its own: it is neither averaged nor
dropped.

Where the claim is that an arm is not worse (non-inferiority) or no different (equivalence), an effect between 0 and
delta must not end the comparison: whichever of "worse" and "no difference" came first would be chance. There the 90 %
interval is compared with delta instead of 0, and where differences are not normal the sign-symmetric evidence against
an effect of delta must reach 10 as well:

    not worse by delta, no difference larger than delta   the interval lies below delta; within (-delta, delta)
    worse by more than delta, better by more than delta   it lies above delta; below -delta (equivalence alone)

Each is false in 5 % of experiments at most, of effects on the wrong side of delta."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llm_quest.errors import UsageError
from llm_quest.experiments import sequential
from llm_quest.experiments.sequential import FIRST_LOOK

Decided = Literal[
    "better", "worse", "no difference larger than delta", "not worse by delta", "worse by more than delta",
    "better by more than delta",
]  # fmt: skip
Outcome = Literal[Decided, "undecided (cap)", "undecided (time)", "invalid", "open"]
Margin = Literal["", "not worse", "no difference"]
Scale = Literal["linear", "log"]
STABILITY_THRESHOLD = 20.0


@dataclass(frozen=True)
class Claim:
    """The terms of a comparison, fixed before the first pair. metric: the name in a run's metrics. delta: the smallest
    difference worth having, on the scale. cap: the largest number of pairs. normal: whether differences are near enough
    to normal for the t statistic alone (losses); accuracies and rewards are not. margin: what is claimed against delta;
    empty: an effect of either sign, or none larger than delta. scale: log: the natural logarithm of the metric is
    compared, so a difference is that of a ratio, for numbers of which a few runs have most of the sum."""

    metric: str
    delta: float
    cap: int
    greater_is_better: bool
    normal: bool
    margin: Margin = ""
    scale: Scale = "linear"

    @property
    def measure(self) -> str:
        """What is compared, in words."""
        return self.metric if self.scale == "linear" else f"{self.scale} {self.metric}"

    def rescale(self, value: float) -> float:
        """A value of the metric on the scale. UsageError for one that has no logarithm."""
        if self.scale == "linear":
            return value
        if value <= 0:
            raise UsageError(f"{self.metric} is {value:g}, and only numbers above 0 have a logarithm (scale: log)")
        return math.log(value)


def scale_delta(delta: float, scale: Scale) -> float:
    """delta on the scale: a ratio above 1 as its natural logarithm."""
    return math.log(delta) if scale == "log" else delta


@dataclass
class ArmProgress:
    """The pairs of an arm so far. arm, control: values of pairs in which both finished. largest: the running maximum of
    E. diverged: pairs in which (the arm, the control) diverged."""

    name: str
    arm: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    evidence: list[float] = field(default_factory=list)
    started: int = 0
    diverged: list[int] = field(default_factory=list)
    control_diverged: list[int] = field(default_factory=list)
    outcome: Outcome = "open"
    reason: str = ""

    @property
    def differences(self) -> list[float]:
        return [a - c for a, c in zip(self.arm, self.control, strict=True)]

    @property
    def largest(self) -> float:
        return max(self.evidence[FIRST_LOOK - 1 :], default=0.0)

    def add(self, seed: int, value: float | None, control: float | None) -> None:
        """A pair; None: that run diverged."""
        self.started += 1
        if value is None or control is None:
            self.diverged += [seed] if value is None else []
            self.control_diverged += [seed] if control is None else []
            return
        self.arm.append(value)
        self.control.append(control)
        self.seeds.append(seed)
        self.evidence.append(sequential.evidence(self.differences))


class Comparison:
    """All arms of an experiment against its control."""

    def __init__(self, claim: Claim, arms: Sequence[str]):
        self.claim = claim
        self.arms = {name: ArmProgress(name) for name in arms}
        self.pairs = 0

    @property
    def open_arms(self) -> list[str]:
        return [name for name, arm in self.arms.items() if arm.outcome == "open"]

    def add_pair(self, seed: int, control: float | None, values: Mapping[str, float | None]) -> None:
        """The measurements of a seed for the control and for the open arms; then every open arm is looked at."""
        self.pairs += 1
        for name in self.open_arms:
            self.arms[name].add(seed, values[name], control)
        rejected = sequential.holm_rejections({name: arm.largest for name, arm in self.arms.items()}, self.claim.cap)
        for name in self.open_arms:
            arm = self.arms[name]
            arm.outcome, arm.reason = self.look(arm, name in rejected)

    def look(self, arm: ArmProgress, reached: bool) -> tuple[Outcome, str]:
        """The outcome after the newest pair. reached: the evidence is enough, among all arms."""
        if (fault := self.stability_fault(arm)) is not None:
            return fault
        if len(arm.arm) >= FIRST_LOOK and self.claim.margin:
            if outcome := self.look_at_margin(arm):
                return outcome, "" if any(arm.differences) else "every pair is identical"
        elif len(arm.arm) >= FIRST_LOOK:
            mean = float(np.mean(arm.differences))
            if reached and self.signs_agree(arm):
                return ("better" if (mean > 0) == self.claim.greater_is_better else "worse"), ""
            low, high = sequential.sequential_interval(arm.differences, self.claim.cap, 0.1)
            if -self.claim.delta < low and high < self.claim.delta and not reached:
                return "no difference larger than delta", "" if any(arm.differences) else "every pair is identical"
        if self.pairs >= self.claim.cap:
            return "undecided (cap)", ""
        return "open", ""

    def look_at_margin(self, arm: ArmProgress) -> Outcome | None:
        """What the harm (what an arm is worse by) decides, beside delta; None where its interval holds delta."""
        delta = self.claim.delta
        beside = self.side(arm, delta)
        if beside > 0:
            return "worse by more than delta"
        if self.claim.margin == "not worse":
            return "not worse by delta" if beside < 0 else None
        other = self.side(arm, -delta)
        if other < 0:
            return "better by more than delta"
        return "no difference larger than delta" if beside < 0 < other else None

    def side(self, arm: ArmProgress, bound: float, alpha: float = 0.1) -> int:
        """1 where all of the arm's harm's interval lies above the bound, -1 below, 0 where the bound is within."""
        harm = -np.array(arm.differences) if self.claim.greater_is_better else np.array(arm.differences)
        low, high = sequential.sequential_interval(harm.tolist(), self.claim.cap, alpha)
        signs = self.claim.normal or float(sequential.sign_evidence(harm - bound)) >= sequential.SIGN_THRESHOLD
        return int(signs) * (int(low > bound) - int(high < bound))

    def stability_fault(self, arm: ArmProgress) -> tuple[Outcome, str] | None:
        only_arm = len(set(arm.diverged) - set(arm.control_diverged))
        discordant = only_arm + len(set(arm.control_diverged) - set(arm.diverged))
        if sequential.stability_evidence(only_arm, discordant) >= STABILITY_THRESHOLD:
            return "worse", f"it diverges: {len(arm.diverged)} of {arm.started} runs"
        return None

    def signs_agree(self, arm: ArmProgress) -> bool:
        return self.claim.normal or self.sign_evidence(arm) >= sequential.SIGN_THRESHOLD

    def sign_evidence(self, arm: ArmProgress) -> float:
        return float(sequential.sign_evidence(arm.differences)) if arm.arm else 1.0

    def threshold(self, name: str) -> float:
        """The threshold of this arm's evidence: Holm's, by its rank among the arms."""
        ordered = sorted(self.arms, key=lambda arm: -self.arms[arm].largest)
        return sequential.evidence_threshold(self.claim.cap, 0.05 / (len(ordered) - ordered.index(name)))

    def verdict(self, name: str) -> dict[str, Any]:
        """The results of an arm, as JSON values."""
        arm, claim = self.arms[name], self.claim
        d = arm.differences
        low, high = sequential.sequential_interval(d, claim.cap)
        enough = len(d) > 1
        return {
            "arm": name, "outcome": arm.outcome, "reason": arm.reason, "metric": claim.measure, "delta": claim.delta,
            "pairs": arm.started, "cap": claim.cap, "seeds": arm.seeds, "differences": d,
            "mean": float(np.mean(d)) if d else None, "median": float(np.median(d)) if d else None,
            "standard_deviation": float(np.std(d, ddof=1)) if enough else None,
            "interval_95": finite_interval(low, high),
            "interval_90": finite_interval(*sequential.sequential_interval(d, claim.cap, 0.1)),
            "evidence": arm.evidence, "threshold": self.threshold(name), "sign_evidence": self.sign_evidence(arm),
            "pairing_gain": finite_or_none(sequential.pairing_gain(arm.arm, arm.control)) if enough else None,
            "diverged": arm.diverged, "control_diverged": arm.control_diverged,
            "divergence_bound": sequential.divergence_bound(arm.started) if arm.started and not arm.diverged else None,
            "decided_by": decisive_number(arm), "size": self.describe_effect_size(arm),
        }  # fmt: skip

    def describe_effect_size(self, arm: ArmProgress) -> str:
        """What the 95 % interval says beyond the outcome."""
        if arm.outcome in ("better", "worse") and arm.differences:
            return describe_size(*sequential.sequential_interval(arm.differences, self.claim.cap), self.claim.delta)
        if self.claim.margin and arm.outcome in ("not worse by delta", "no difference larger than delta"):
            return ("", "worse than the control by less", "better than the control")[self.side(arm, 0.0, 0.05)]
        return ""


EVIDENCE_OUTCOMES = ("better", "worse")
"""Outcomes that E decides; those that name delta are decided by the 90 % interval."""


def decisive_number(arm: ArmProgress) -> str:
    """The number that decided an arm: a key of its verdict, or empty."""
    if arm.outcome in EVIDENCE_OUTCOMES:
        return "diverged" if arm.reason else "evidence"
    return "interval_90" if arm.outcome.endswith("delta") else ""


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def finite_interval(low: float, high: float) -> list[float] | None:
    """None for an interval without bounds, of too few pairs."""
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def describe_size(low: float, high: float, delta: float) -> str:
    """The size of an effect, compared with delta."""
    if low >= delta or high <= -delta:
        return "by at least delta"
    return "by less than delta" if -delta < low and high < delta else ""
