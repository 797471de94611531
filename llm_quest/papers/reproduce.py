"""Measures the claim of a paper: at each size a paired experiment, until it is decided or the time is over. Finished
runs are kept below the folder of experiments, so the same command goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.experiments.arms import CONTROL, Arm, default_pairs, resolve_arms
from llm_quest.experiments.bases import Base
from llm_quest.experiments.code_tree import own_code
from llm_quest.experiments.comparison import Claim, scale_delta
from llm_quest.experiments.experiment import Experiment, ExperimentPlan
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.measurements import OutOfTime
from llm_quest.experiments.page import write_experiment_page
from llm_quest.experiments.run_costs import count_runs
from llm_quest.experiments.worker_pool import exclusive_pool
from llm_quest.files import atomic_write_json
from llm_quest.formatting import format_duration_range
from llm_quest.machine.profile import identify_machine
from llm_quest.papers.paper import Paper
from llm_quest.progress import utc_now
from llm_quest.train.best_model import is_greater_better

AA_PAIRS = 2
SizeResult = dict[str, Any]


def make_paper_plan(paper: Paper, size: str, log: LogFn, *, first_seed: int = 1) -> ExperimentPlan:
    """The experiment of a claim at a size. UsageError for a size that it does not have."""
    if size not in paper.all_sizes:
        raise UsageError(f"{paper.name} has no size {size}; it has {', '.join(paper.all_sizes)}")
    recipe = paper.bench_spec.recipe
    pairs = paper.fill_in([*paper.bench_spec.settings, *paper.settings], size)
    base = (*default_pairs(recipe, pairs), *pairs)
    arms = [
        Arm(name, paper.fill_in(given, size), own_code(), paper.metrics.get(name, ""))
        for name, given in paper.arms.items()
    ]
    return ExperimentPlan(
        recipe, base, tuple(resolve_arms(recipe, base, arms, log)), Arm(CONTROL, (), own_code()),
        comparison_claim(paper),
        paper.budget or ("flops" if recipe == "pretrain" else "steps"), paper.rates, paper.tuning_seeds, AA_PAIRS,
        first_seed, tuple(paper.secondary), paper.claim, reproduce_command(paper, size, first_seed),
        tuple(make_base(paper, name, size) for name in paper.all_bases),
    )  # fmt: skip


def comparison_claim(paper: Paper) -> Claim:
    """What is fixed before the first pair; by it a card's verdict follows from its differences."""
    greater = is_greater_better(paper.metric)
    margin = paper.expect if paper.expect in ("not worse", "no difference") else ""
    delta = scale_delta(paper.delta, paper.scale)
    assert delta > 0, f"{paper.name}: delta {paper.delta:g} is no difference (of scale: log, a ratio above 1)"
    return Claim(paper.metric, delta, paper.cap, greater, not greater, margin, paper.scale)


def reproduce_command(paper: Paper, size: str, first_seed: int = 1) -> str:
    """The command that measures a claim at a size, from this seed on."""
    if first_seed > 1:
        return f"quest reproduce {paper.name} --size {size} --first-seed {first_seed}"
    return f"quest reproduce {paper.name} --size {size}"


def make_base(paper: Paper, name: str, size: str) -> Base:
    given = paper.all_bases[name]
    pairs = paper.fill_in(given["settings"], size)
    return Base(name, given["recipe"], (*default_pairs(given["recipe"], pairs), *pairs))


def describe_cost(paper: Paper, size: str) -> str:
    """What a claim costs at most at a size, and at least, from the measured CPU seconds of a run and of its bases."""
    arms, seconds = len(paper.arms) + 1, float(paper.bench_spec.sizes[size]["seconds"])
    counts = count_runs(arms, paper.rates, paper.tuning_seeds, AA_PAIRS, paper.cap, len(paper.all_bases))
    of_bases = sum(float(base["seconds"][size]) for base in paper.all_bases.values())
    low, high = (
        seconds * runs + of_bases * seeds
        for runs, seeds in zip((counts.least, counts.most), counts.start_seeds, strict=True)
    )
    return f"{size}: {counts}; {format_duration_range(low, high)} of one core"


def measure_paper(
    paper: Paper, size: str, root: Path, *, jobs: int, minutes: float, first_seed: int = 1, log: LogFn
) -> SizeResult | None:
    """What was found at a size; None where the time was over before the first four pairs."""
    plan = make_paper_plan(paper, size, log, first_seed=first_seed)
    folder, ledger = root / plan.experiment, Ledger(root / "ledger.jsonl", log)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_pool(folder, jobs, "the same claim is being measured; wait for it") as pool:
            log(f"{paper.name} at {describe_cost(paper, size)}")
            deadline = time.monotonic() + 60 * minutes
            experiment = Experiment(plan, root, pool, ledger, log, deadline=deadline)
            result = experiment.run()
    except OutOfTime:
        log(f"{paper.name} at {size}: {minutes:g} minutes were over before four pairs; the same command goes on")
        return None
    atomic_write_json(folder / "result.json", result)
    write_experiment_page(result, root, folder / "report.html")
    return shorten_result(result, experiment.costs) | {"page": str(folder / "report.html")}


def shorten_result(result: Mapping[str, Any], costs: Mapping[str, Sequence[Mapping[str, Any]]]) -> SizeResult:
    """What a card keeps of an experiment, with its cost, date and machine."""
    runs = [record for records in costs.values() for record in records]
    verdict_keys = (
        "arm", "outcome", "size", "reason", "pairs", "seeds", "differences", "mean", "median", "standard_deviation",
        "interval_95", "interval_90", "decided_by", "evidence", "threshold", "pairing_gain", "diverged",
        "control_diverged", "secondary",
    )  # fmt: skip
    arm_keys = ("parameters", "steps", "flops", "shared_weights", "rates", "learning_rate", "values")
    code = result["arms"][CONTROL]["code"]
    return {
        "experiment": result["experiment"], "code": code, "torch": torch.__version__, "date": utc_now()[:10],
        "machine": identify_machine()["processor"], "runs": len(runs),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in runs)),
        "verdicts": [{key: verdict[key] for key in verdict_keys} for verdict in result["verdicts"]],
        "arms": {name: {key: arm[key] for key in arm_keys} for name, arm in result["arms_measured"].items()},
        "noise": result["noise"], "notes": result["notes"],
    }  # fmt: skip
