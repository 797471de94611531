"""The best checkpoint of a run by one of its metrics, and when to stop because it gets no better.

metric_for_best_model: eval/loss     early_stopping_patience: 2

step      50    100    150    200          kept: 100, and the newest
eval/loss 2.1   1.9*   2.0    2.2  stop    RUN@best is step-00000100
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_quest.errors import UsageError
from llm_quest.train.state import Progress

LOWER_IS_BETTER = ("loss", "perplexity", "bits", "error", "kl", "nats")
"""A metric with one of these words in the last part of its name is best where it is smallest."""


def is_greater_better(name: str) -> bool:
    """Whether the largest value of this metric is the best one, by its name."""
    return not any(word in name.rpartition("/")[2] for word in LOWER_IS_BETTER)


@dataclass(frozen=True)
class BestModel:
    """Tracks the metric by which the best checkpoint is chosen, and early stopping. metric: the name, empty for none.
    greater_is_better: None asks the name. patience: measurements without a better value after which the run ends; None:
    it never does. known: the metrics that the run has measured so far."""

    metric: str
    greater_is_better: bool | None = None
    patience: int | None = None
    known: set[str] = field(default_factory=set, compare=False)

    def update(self, progress: Progress, measured: Mapping[str, Any]) -> bool:
        """Record the value that was measured at this step; return whether it is the best so far. A value that is not
        finite is never the best, and counts as a measurement."""
        if self.metric not in measured:
            return False
        if progress.best_name != self.metric:
            progress.best_name, progress.best_metric, progress.best_step = self.metric, None, None
            progress.measurements_since_best = 0
        value = float(measured[self.metric])
        better = math.isfinite(value) and self.is_better(value, progress.best_metric)
        progress.measurements_since_best = 0 if better else progress.measurements_since_best + 1
        if better:
            progress.best_metric, progress.best_step = value, progress.step
        return better

    def is_better(self, value: float, best: float | None) -> bool:
        greater = is_greater_better(self.metric) if self.greater_is_better is None else self.greater_is_better
        return best is None or (value > best if greater else value < best)

    def is_exhausted(self, progress: Progress) -> bool:
        """Whether the metric has not improved for `patience` measurements, so that the run ends."""
        return (
            self.patience is not None
            and progress.best_name == self.metric
            and progress.measurements_since_best >= self.patience
        )

    def require_measured(self) -> None:
        """UsageError for a metric that the run does not measure, once every evaluator has measured.

        Commonly got wrong: checking after the first evaluator; each has an interval of its own."""
        if self.metric not in self.known:
            named = ", ".join(sorted(self.known))
            raise UsageError(f"metric_for_best_model {self.metric} is not measured in this run; measured are {named}")

    def describe(self, progress: Progress) -> str:
        """The reason for early stopping, in words."""
        times = progress.measurements_since_best
        best = (
            "never finite" if progress.best_step is None else f"{progress.best_metric:.4g} at step {progress.best_step}"
        )
        return f"{self.metric} has not become better for {times} measurements; the best was {best}"
