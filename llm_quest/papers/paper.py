"""What a paper is here: a claim, the experiment that tests it beside its control, and a verdict that the numbers give.

An experiment has arms, one of them the control; each arm is a function of a seed and returns what it measured. The
judge is a function of all measurements, written before they were made: it says what would confirm the claim, what
would refute it, and that anything between is "no effect seen"."""

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
    """What one arm reached with one seed. curve: (x, y) pairs to draw, NaN where a number was not finite."""

    numbers: Mapping[str, float]
    curve: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class MeanInterval:
    """A mean over seeds and the half width of its 95 % interval (infinite for one seed)."""

    mean: float
    half_width: float

    @property
    def positive(self) -> bool:
        """Is zero below the whole interval?"""
        return self.mean - self.half_width > 0

    @property
    def negative(self) -> bool:
        return self.mean + self.half_width < 0

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ± {self.half_width:.2g}" if math.isfinite(self.half_width) else "")


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Student's interval of the mean."""
    if len(values) < 2:
        return MeanInterval(values[0], math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return MeanInterval(statistics.fmean(values), STUDENT_T95.get(len(values) - 1, 1.96) * error)


@dataclass
class ExperimentResults:
    """arm -> seed -> what was measured."""

    arms: dict[str, dict[int, Measurement]] = field(default_factory=dict)

    def add(self, arm: str, seed: int, measured: Measurement) -> None:
        self.arms.setdefault(arm, {})[seed] = measured

    def values(self, arm: str, number: str) -> list[float]:
        """One per seed, in the seeds' order."""
        return [measured.numbers[number] for _, measured in sorted(self.arms[arm].items())]

    def interval(self, arm: str, number: str) -> MeanInterval:
        return mean_interval(self.values(arm, number))

    def difference(self, arm: str, control: str, number: str) -> MeanInterval:
        """Arm minus control, paired by seed: what the seeds share falls out."""
        seeds = sorted(self.arms[arm].keys() & self.arms[control].keys())
        return mean_interval([self.arms[arm][s].numbers[number] - self.arms[control][s].numbers[number] for s in seeds])


@dataclass(frozen=True)
class Verdict:
    """explanation: one sentence with the numbers it rests on."""

    outcome: VerdictOutcome
    explanation: str

    def __str__(self) -> str:
        return f"{self.outcome}: {self.explanation}"


def verdict_from_interval(effect: MeanInterval, words: str, *, wanted: Literal["positive", "negative"]) -> Verdict:
    """confirmed if the whole interval lies on the wanted side of zero, refuted if on the other."""
    if effect.positive or effect.negative:
        return Verdict("confirmed" if effect.positive == (wanted == "positive") else "refuted", words)
    return Verdict("no effect seen", words)


@dataclass(frozen=True)
class CurvePlot:
    """How an experiment is drawn: x and y of the arms' curves."""

    x: str
    y: str
    log: bool = False


@dataclass(frozen=True)
class Paper:
    """claim: in a sentence. experiment: what is done and what the control is. confirms, refutes: said beforehand.
    arms: name -> function of a seed, the control among them. minutes: for all arms and three seeds, on one core."""

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
