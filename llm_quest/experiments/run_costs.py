"""Counts the runs of an experiment, those that are there already, and estimates what the others take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llm_quest.experiments import sequential
from llm_quest.experiments.arm_tuning import ArmTuning, TunableRuns, why_untuned
from llm_quest.experiments.arms import CONTROL
from llm_quest.experiments.measurements import Measurements, RunRequest, has_record, read_record
from llm_quest.experiments.noise import aa_requests, nuisance_setting
from llm_quest.experiments.tuning import MAX_EXTENSIONS
from llm_quest.experiments.worker_pool import WorkerPool
from llm_quest.formatting import format_duration, format_duration_range


@dataclass(frozen=True)
class RunCounts:
    """Runs of an experiment, at most: the control and `arms` - 1 arms; tuning, tuning_more: of the first rates, and of
    those that are added where they do not tell the best one; aa, aa_pairs: A/A runs and pairs; cap: pairs at most.
    bases: runs that arms begin from, each once a seed; other_seeds: seeds that no pair has."""

    arms: int
    tuning: int
    tuning_more: int
    aa: int
    aa_pairs: int
    cap: int
    bases: int = 0
    other_seeds: int = 0

    @property
    def least(self) -> int:
        return self.tuning + self.aa + self.arms * sequential.FIRST_LOOK

    @property
    def most(self) -> int:
        return self.tuning + self.tuning_more + self.aa + self.arms * self.cap

    @property
    def start_seeds(self) -> tuple[int, int]:
        """Seeds for which each base is trained, at least and at most."""
        return self.other_seeds + sequential.FIRST_LOOK, self.other_seeds + self.cap

    def estimate(self, control: float, together: float) -> tuple[float, float]:
        """The seconds of all runs one after another, at least and at most. control: seconds of a run of the control;
        together: of one run of each arm, the control among them."""
        least, most = (self.tuning, sequential.FIRST_LOOK), (self.tuning + self.tuning_more, self.cap)
        low, high = ((tuning / self.arms + pairs) * together for tuning, pairs in (least, most))
        return self.aa * control + low, self.aa * control + high

    def __str__(self) -> str:
        more = f" (up to {self.tuning + self.tuning_more} where an arm needs more rates)" if self.tuning_more else ""
        pairs = f"{sequential.FIRST_LOOK} to {self.cap} pairs"
        low, high = (self.bases * seeds for seeds in self.start_seeds)
        starts = f" and {low} to {high} that they begin from" if self.bases else ""
        return (
            f"{self.arms} arms; {self.tuning} runs to tune{more}, {self.aa} runs for {self.aa_pairs} A/A pairs, "
            f"{self.arms * sequential.FIRST_LOOK} to {self.arms * self.cap} runs in {pairs}: {self.least} to "
            f"{self.most} runs{starts}"
        )


def count_runs(arms: int, rates: int, tuning_seeds: int, aa_pairs: int, cap: int, bases: int = 0) -> RunCounts:
    """The runs of an experiment. arms: with the control. Each A/A pair has two runs, and one run is repeated."""
    tuned = tuning_seeds if rates > 1 else 0
    tuning, more = rates * arms * tuned, MAX_EXTENSIONS * arms * tuned
    return RunCounts(arms, tuning, more, 2 * aa_pairs + bool(aa_pairs), aa_pairs, cap, bases, aa_pairs + tuned)


@dataclass
class FinishedRuns:
    """How many runs of each arm are there already. certain: of those that are made in any case; possible: of those that
    come where rates or pairs decide nothing."""

    certain: Counter[str] = field(default_factory=Counter)
    possible: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        count = self.certain.total() + self.possible.total()
        return f"; {count} of them are there already" if count else ""


class PlannedRuns(TunableRuns, Protocol):
    """The part of an experiment that its estimate needs. records: the folder in which runs are looked
    for that are there already, which are `finished`."""

    measurements: Measurements
    pool: WorkerPool
    records: Path
    finished: FinishedRuns

    @property
    def counts(self) -> RunCounts: ...

    def num_steps(self, name: str) -> int: ...


def find_finished_runs(bench: PlannedRuns) -> FinishedRuns:
    """The runs that are there already. The settings of pairs follow from the rates, so pairs are found where every run
    of the tuning is there."""
    found, rates = FinishedRuns(), dict[str, Sequence[str]]()
    if not why_untuned(bench):
        tuning = ArmTuning(bench)
        for number, one_round in enumerate(tuning.rounds()):
            requests = tuning.requests(one_round)
            done = count_finished(bench, requests, found.possible if number else found.certain)
            if len(done) < len(requests):
                return found
            tuning.add(one_round, [read_record(folder) for folder in done])
        rates = {name: [f"learning_rate={search.choose():g}"] for name, search in tuning.searches.items()}
    if bench.plan.aa_pairs:
        aa = aa_requests(bench, nuisance_setting(bench), rates.get(CONTROL, ()))
        count_finished(bench, aa, found.certain)
    for number in range(bench.plan.claim.cap):
        seed = bench.plan.first_seed + number
        pair = [bench.request(name, seed, "report", rates.get(name, ())) for name in bench.arms]
        count_finished(bench, pair, found.certain if number < sequential.FIRST_LOOK else found.possible)
    return found


def count_finished(bench: PlannedRuns, requests: Sequence[RunRequest], counter: Counter[str]) -> list[Path]:
    """The folders of those that are there already, which are counted by their arms."""
    folders = [bench.records / "runs" / bench.measurements.fingerprint(request) for request in requests]
    counter.update(request.arm for request, folder in zip(requests, folders, strict=True) if has_record(folder))
    return [folder for folder in folders if has_record(folder)]


def announce_cost(bench: PlannedRuns) -> None:
    """Log the number of runs, and the time that they take by the control's measured step, start and evaluation."""
    bench.log(f"{bench.counts}{bench.finished}")
    run, total, jobs = estimate_arm_seconds(bench, CONTROL), estimate_seconds(bench), bench.pool.jobs
    if run is None or total is None:
        bench.log("estimate: none, as steps of this recipe can't be timed beforehand; the first run brings an ETA")
        return
    outside, share = (bench.descriptions[CONTROL][key] for key in ("outside_seconds", "cpu_share"))
    bench.log(
        f"estimate: {format_duration(run)} a run on one thread, {outside / run:.0%} of it start and evaluation; "
        f"{format_duration_range(*total)} in all, {jobs} at once (at the present load, where a process has "
        f"{share:.0%} of a core: {format_duration(run * share)} of CPU a run)"
    )


def estimate_arm_seconds(bench: PlannedRuns, name: str) -> float | None:
    """The seconds of a run of an arm: the control's step, by the arm's FLOPs, and the control's start and evaluations.
    None where steps cannot be timed beforehand."""
    arm, control = bench.descriptions[name], bench.descriptions[CONTROL]
    if "outside_seconds" not in control:
        return None
    relative = arm["flops_per_step"] / control["flops_per_step"]
    return control["outside_seconds"] + control["step_seconds"] * relative * bench.num_steps(name)


def estimate_seconds(bench: PlannedRuns) -> tuple[float, float] | None:
    """The seconds of all runs that are not there yet, at least and at most."""
    runs = {name: seconds for name in bench.arms if (seconds := estimate_arm_seconds(bench, name)) is not None}
    if len(runs) < len(bench.arms):
        return None
    low, high = bench.counts.estimate(runs[CONTROL], sum(runs.values()))
    certain, possible = (
        sum(runs[name] * count for name, count in counter.items())
        for counter in (bench.finished.certain, bench.finished.possible)
    )
    return max(0.0, low - certain) / bench.pool.jobs, max(0.0, high - certain - possible) / bench.pool.jobs
