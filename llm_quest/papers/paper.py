"""Types of a reproduction: `Paper` (claim, experiment, arms, verdict), `Measurement`, `ExperimentResults`, and the
statistics of a verdict.

An experiment has arms, one of which is the control. An arm is a function of a seed that returns a `Measurement`. The
verdict is a function of all measurements and is written before they are made: it states which numbers confirm the claim
and which refute it; everything between is "no effect seen"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

VerdictOutcome = Literal["confirmed", "refuted", "no effect seen"]
STUDENT_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % points of Student's t by degrees of freedom."""


@dataclass(frozen=True)
class Measurement:
    """The result of one arm with one seed. curve: (x, y) pairs to plot, y NaN where it was not finite."""

    numbers: Mapping[str, float]
    curve: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class MeanInterval:
    """A mean over seeds with the half width of its 95 % interval (infinite for one seed)."""

    mean: float
    half_width: float

    @property
    def positive(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.mean - self.half_width > 0

    @property
    def negative(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.mean + self.half_width < 0

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ± {self.half_width:.2g}" if math.isfinite(self.half_width) else "")


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """The mean of `values` with Student's 95 % interval."""
    if len(values) < 2:
        return MeanInterval(values[0], math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return MeanInterval(statistics.fmean(values), STUDENT_T95.get(len(values) - 1, 1.96) * error)


@dataclass
class ExperimentResults:
    """Measurements of an experiment: arm -> seed -> `Measurement`."""

    arms: dict[str, dict[int, Measurement]] = field(default_factory=dict)

    def add(self, arm: str, seed: int, measured: Measurement) -> None:
        self.arms.setdefault(arm, {})[seed] = measured

    def values(self, arm: str, number: str) -> list[float]:
        """A number of an arm for every seed, in the order of the seeds."""
        return [measured.numbers[number] for _, measured in sorted(self.arms[arm].items())]

    def interval(self, arm: str, number: str) -> MeanInterval:
        return mean_interval(self.values(arm, number))

    def difference(self, arm: str, control: str, number: str) -> MeanInterval:
        """Arm minus control, paired by seed, so that variation between seeds cancels."""
        seeds = sorted(self.arms[arm].keys() & self.arms[control].keys())
        return mean_interval([self.arms[arm][s].numbers[number] - self.arms[control][s].numbers[number] for s in seeds])


@dataclass(frozen=True)
class Verdict:
    """An outcome with its explanation: one sentence with the numbers that decide it."""

    outcome: VerdictOutcome
    explanation: str

    def __str__(self) -> str:
        return f"{self.outcome}: {self.explanation}"


def verdict_from_interval(
    effect: MeanInterval, explanation: str, *, wanted: Literal["positive", "negative"]
) -> Verdict:
    """Confirmed if the whole interval lies on the wanted side of zero, refuted if it lies on the other side."""
    if effect.positive or effect.negative:
        return Verdict("confirmed" if effect.positive == (wanted == "positive") else "refuted", explanation)
    return Verdict("no effect seen", explanation)


@dataclass(frozen=True)
class CurvePlot:
    """Axis labels of the plot of the arms' curves; log: a logarithmic y axis."""

    x: str
    y: str
    log: bool = False


@dataclass(frozen=True)
class Paper:
    """A reproduction. claim: one sentence. experiment: the setup and the control. confirms, refutes: the criteria,
    stated beforehand. arms: name -> function of a seed, the control included. minutes: of all arms with three seeds on
    one core."""

    name: str
    title: str
    arxiv: str
    claim: str
    experiment: str
    confirms: str
    refutes: str
    arms: Mapping[str, Callable[[int], Measurement]]
    verdict: Callable[[ExperimentResults], Verdict]
    plot: CurvePlot
    minutes: float
    notes: str = ""
