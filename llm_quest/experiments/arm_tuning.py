"""Tunes the learning rates of an experiment's arms: rounds of rates on the tuning seeds, as many for each arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from llm_quest.experiments.arms import CONTROL, Arm
from llm_quest.experiments.measurements import TUNING_SEEDS, Record, RunRequest
from llm_quest.experiments.noise import ExperimentRuns
from llm_quest.experiments.tuning import RateSearch, describe_search, first_grid, needs_extension

RatesOfArms = Mapping[str, Sequence[float]]


class TunableRuns(ExperimentRuns, Protocol):
    """What tuning needs of an experiment besides what A/A pairs need: its arms, and whether a loss is that of a model
    that has learned nothing."""

    arms: dict[str, Arm]

    def is_unlearned(self, value: float) -> bool: ...


def why_untuned(bench: TunableRuns) -> str:
    """Why rates stay as they were given; empty where they are tuned."""
    if bench.plan.rates < 2:
        whose = f"those of {bench.plan.confirms}" if bench.plan.confirms else "not tuned"
        return f"learning rates are {whose}: the verdict holds for the rates that were given"
    if any(arm.sets("learning_rate") for arm in bench.arms.values()):
        return "learning_rate is what differs, so it is not tuned"
    return ""


class ArmTuning:
    """The rate searches of all arms of an experiment, the control among them."""

    def __init__(self, bench: TunableRuns):
        self.bench = bench
        self.searches = {name: RateSearch() for name in bench.arms}

    def run(self) -> dict[str, RateSearch]:
        """Try rates until no arm asks for more; the searches."""
        for number, rates in enumerate(self.rounds()):
            if number:
                self.bench.log(
                    "one more rate of each arm: a best one is at an edge, or the loss rises far more on one side of it"
                )
            self.try_rates(rates, "tuning one more rate" if number else "tuning learning rates")
        for name, search in self.searches.items():
            self.announce(name, search)
        return self.searches

    def rounds(self) -> Iterator[RatesOfArms]:
        """The rates of each round; the losses of a round are added before the next one is asked for."""
        count = self.bench.plan.rates
        yield {name: first_grid(self.bench.descriptions[name]["learning_rate"], count) for name in self.searches}
        while needs_extension(self.searches, count):
            yield {name: [search.next_rate()] for name, search in self.searches.items()}

    def try_rates(self, rates: RatesOfArms, what: str) -> None:
        self.add(rates, self.bench.measure(self.requests(rates), what))

    def requests(self, rates: RatesOfArms) -> list[RunRequest]:
        """The runs of a round: every rate of every arm on each tuning seed."""
        return [
            self.bench.request(name, seed, "tune", [f"learning_rate={rate:g}"])
            for name, rates_of_arm in rates.items() for rate in rates_of_arm for seed in self.seeds
        ]  # fmt: skip

    def add(self, rates: RatesOfArms, records: Sequence[Record]) -> None:
        """The mean loss of each rate of a round over the tuning seeds. records: of its requests, in their order."""
        left = iter(records)
        for name, rates_of_arm in rates.items():
            for rate in rates_of_arm:
                losses = [self.loss(next(left), name) for _ in self.seeds]
                self.searches[name].losses[rate] = statistics.fmean(losses)

    @property
    def seeds(self) -> Sequence[int]:
        return TUNING_SEEDS[: self.bench.plan.tuning_seeds]

    def loss(self, record: Record, name: str) -> float:
        """What is compared, where less is better; infinite if the run diverged."""
        value = self.bench.value_on_scale(record, name)
        if value is None:
            return math.inf
        return -value if self.bench.plan.claim.greater_is_better else value

    def announce(self, name: str, search: RateSearch) -> None:
        """Log the rates of an arm, and note where they do not tell its best one."""
        self.bench.log(describe_search(name, search))
        if search.at_edge:
            self.bench.note(f"{name}: the best learning rate is at the edge of those tried")
        if self.bench.is_unlearned(min(search.losses.values())):
            unigram = self.bench.descriptions[CONTROL]["unigram_loss"]
            self.bench.note(
                f"{name} uses its context at none of these rates: its loss is that of token frequencies, "
                f"{unigram:.3f}, and its pairs will be invalid; stop here, and give more steps (max_steps)"
            )
