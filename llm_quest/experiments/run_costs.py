"""Counts the runs of an experiment, and what they take."""

from __future__ import annotations

from dataclasses import dataclass

from llm_quest.experiments import sequential
from llm_quest.experiments.tuning import MAX_EXTENSIONS


@dataclass(frozen=True)
class RunCounts:
    """Runs of an experiment, at most: the control and `arms` - 1 arms; tuning, tuning_more: of the first rates, and of
    those that are added where they do not tell the best one; aa, aa_pairs: A/A runs and pairs; cap: pairs at most."""

    arms: int
    tuning: int
    tuning_more: int
    aa: int
    aa_pairs: int
    cap: int

    @property
    def least(self) -> int:
        return self.tuning + self.aa + self.arms * sequential.FIRST_LOOK

    @property
    def most(self) -> int:
        return self.tuning + self.tuning_more + self.aa + self.arms * self.cap

    def estimate(self, control: float, together: float) -> tuple[float, float]:
        """The seconds of all runs one after another, at least and at most. control: seconds of a run of the control;
        together: of one run of each arm, the control among them."""
        least, most = (self.tuning, sequential.FIRST_LOOK), (self.tuning + self.tuning_more, self.cap)
        low, high = ((tuning / self.arms + pairs) * together for tuning, pairs in (least, most))
        return self.aa * control + low, self.aa * control + high

    def __str__(self) -> str:
        more = f" (up to {self.tuning + self.tuning_more} where an arm needs more rates)" if self.tuning_more else ""
        pairs = f"{sequential.FIRST_LOOK} to {self.cap} pairs"
        return (
            f"{self.arms} arms; {self.tuning} runs to tune{more}, {self.aa} runs for {self.aa_pairs} A/A pairs, "
            f"{self.arms * sequential.FIRST_LOOK} to {self.arms * self.cap} runs in {pairs}: {self.least} to "
            f"{self.most} runs"
        )


def count_runs(arms: int, rates: int, tuning_seeds: int, aa_pairs: int, cap: int) -> RunCounts:
    """The runs of an experiment. arms: with the control. Each A/A pair has two runs, and one run is repeated."""
    each = arms * tuning_seeds if rates > 1 else 0
    return RunCounts(arms, rates * each, MAX_EXTENSIONS * each, 2 * aa_pairs + bool(aa_pairs), aa_pairs, cap)
