"""Measures how much equal arms differ (A/A pairs), before anything is compared.

the control twice with one seed           the same bits, or the experiment ends
micro-batches of another size             another order of sums and nothing else: the noise of a pair
the control with another seed             the noise without pairing"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from llm_quest.contracts import LogFn
from llm_quest.errors import DataError
from llm_quest.experiments.arms import CONTROL
from llm_quest.experiments.measurements import AA_SEEDS, Record, RunRequest

NOISE_FACTORS = {2: 31.9, 3: 6.3, 4: 3.7, 5: 2.9}
"""Pairs -> how many times larger than measured a standard deviation may be (95 %)."""


class ExperimentRuns(Protocol):
    """The part of an experiment that A/A pairs need: its plan, descriptions of its arms, and runs."""

    plan: Any
    descriptions: dict[str, dict[str, Any]]
    log: LogFn

    def request(self, name: str, seed: int, role: str, extra: Sequence[str] = (), repeat: int = 0) -> RunRequest: ...
    def measure(self, requests: Sequence[RunRequest], what: str) -> list[Record]: ...
    def value_on_scale(self, record: Record, name: str) -> float | None: ...
    def note(self, text: str) -> None: ...


def measure_noise(bench: ExperimentRuns) -> dict[str, Any]:
    """The noise floor. DataError where a run is not repeatable."""
    seeds = AA_SEEDS[: bench.plan.aa_pairs]
    nuisance = nuisance_setting(bench)
    records = bench.measure(aa_requests(bench, nuisance), "runs of A/A pairs")
    values = [bench.value_on_scale(record, CONTROL) for record in records]
    if values[0] != values[len(seeds)]:
        raise DataError(
            f"the control's run isn't repeatable: with seed {seeds[0]} it gave {values[0]} and {values[len(seeds)]}\n"
            "so nothing can be compared; look for code that draws random numbers without the run's seed"
        )
    single = [value for value in values[: len(seeds)] if value is not None]
    pairs = zip(values[: len(seeds)], values[len(seeds) + 1 :], strict=False)
    return describe_noise(bench, nuisance, single, [b - a for a, b in pairs if a is not None and b is not None])


def aa_requests(bench: ExperimentRuns, nuisance: str, extra: Sequence[str] = ()) -> list[RunRequest]:
    """The control with each seed, once more with the first one, and with the nuisance setting. extra: settings that it
    does not have yet."""
    seeds = AA_SEEDS[: bench.plan.aa_pairs]
    plain = [bench.request(CONTROL, seed, "aa", extra) for seed in seeds]
    repeat = [bench.request(CONTROL, seed, "aa", extra, repeat=1) for seed in seeds[:1]]
    other = [replace(request, pairs=(*request.pairs, nuisance)) for request in plain] if nuisance else []
    return [*plain, *repeat, *other]


def nuisance_setting(bench: ExperimentRuns) -> str:
    """A setting that changes the order of sums alone; empty where there is none."""
    control = bench.descriptions[CONTROL]
    rows = int(control["rows"])
    given = [pair.partition("=")[0] for pair in bench.plan.pairs]
    sizes = [size for size in range(1, rows // 3 + 1) if rows % size == 0]
    possible = control["micro_batches"] and sizes and "micro_batch_size" not in given
    return f"micro_batch_size={sizes[-1]}" if possible else ""


def describe_noise(bench: ExperimentRuns, nuisance: str, single: Sequence[float], d: Sequence[float]) -> dict[str, Any]:
    """The noise in numbers, and what it means for delta."""
    pair_sd = statistics.stdev(d) if len(d) > 1 else None
    run_sd = statistics.stdev(single) if len(single) > 1 else None
    delta = bench.plan.claim.delta
    if pair_sd and run_sd:
        bench.log(
            f"A/A: the same seed gives the same bits; with {nuisance} equal arms differ by rounding noise, sd "
            f"{pair_sd:.3g} ({len(d)} pairs, so at most {NOISE_FACTORS.get(len(d), 2.9) * pair_sd:.2g}); runs of "
            f"different seeds differ with sd {run_sd:.3g}"
        )
    if pair_sd and delta < 1.5 * pair_sd:
        bench.note(
            f"delta {delta:g} is less than 1.5 times the noise of equal arms ({pair_sd:.3g}), so 'undecided' is "
            "probable: evaluate on more tokens, train longer, or raise --cap"
        )
    return {
        "repeatable": True, "nuisance": nuisance, "differences": list(d), "pair_sd": pair_sd, "run_sd": run_sd,
    }  # fmt: skip
