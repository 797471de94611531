"""The direction of decided claims, measured anew: `python -m tests.papers.directions [NAME ...] [--count N]`.

Asked are cards whose differences lie so far from 0, for their number, that one pair of complete runs with the rates
that the card tuned has the same sign in 98 of 100 cases. Where it has not, two more seeds are
measured, and the mean of the three counts. CI asks two of them, others every day; 15 to 35 s of CPU a claim. Exit
code 1 where a direction has changed."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.experiments.arms import CONTROL, Arm
from llm_quest.experiments.budgets import budget_pairs
from llm_quest.experiments.experiment import ExperimentPlan
from llm_quest.experiments.measurements import read_metric
from llm_quest.experiments.scaling_law import student_quantile
from llm_quest.experiments.worker import describe_arm, run_arm
from llm_quest.papers import load_paper
from llm_quest.papers.reproduce import make_paper_plan
from tests.papers.dry_run import fill_in_folders

CARDS = Path(__file__).resolve().parents[2] / "docs/papers"
STRONG = 1.25
"""How many times the half-width of Student's 95 % interval of one further difference the mean lies from 0, at least."""
SEEDS = (201, 202, 203)
"""No card reports them, nor is a rate tuned on them."""


@dataclass(frozen=True)
class Direction:
    """The sign of an arm's difference from the control, on a card. rates: of the arms, as they were tuned."""

    paper: str
    size: str
    arm: str
    sign: int
    rates: Mapping[str, float]


def strong_directions(cards: Path = CARDS) -> list[Direction]:
    """The directions that one pair of runs shows."""
    found = []
    for file in sorted(cards.glob("*.json")):
        card = json.loads(file.read_text(encoding="utf-8"))
        size, result = next(iter(card["sizes"].items()))
        rates = {name: arm["learning_rate"] for name, arm in result["arms"].items()}
        for verdict in result["verdicts"]:
            if is_strong(verdict["differences"]):
                sign = 1 if verdict["mean"] > 0 else -1
                found.append(Direction(card["paper"], size, verdict["arm"], sign, rates))
    return found


def is_strong(differences: Sequence[float]) -> bool:
    count = len(differences)
    further = student_quantile(count - 1) * statistics.stdev(differences) * math.sqrt(1 + 1 / count)
    return abs(statistics.mean(differences)) >= STRONG * further


def find_differences(direction: Direction) -> list[float]:
    """The differences of the first seed, or of all three where that has the other sign."""
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure_difference(direction, f"seed={seed}", Path(folder)))
        if found[0] * direction.sign > 0:
            break
    return found


def measure_difference(direction: Direction, seed: str, root: Path) -> float:
    """The arm's metric minus the control's, of one pair of complete runs."""
    plan = make_paper_plan(load_paper(direction.paper), direction.size, lambda text: None)
    folders: dict[str, str] = {}
    for base in plan.bases:
        folders[base.name] = str(root / base.name)
        pairs = [*fill_in_folders(base.pairs, folders), seed]
        run_arm({"recipe": base.recipe, "pairs": pairs, "folder": folders[base.name], "keep_model": True})
    arm = next(one for one in plan.arms if one.name == direction.arm)
    pairs = {one.name: fill_in_folders((*plan.pairs, *one.pairs), folders) for one in (plan.control, arm)}
    about = {name: describe_arm({"recipe": plan.recipe, "pairs": [*own, seed]}) for name, own in pairs.items()}
    values = []
    for one in (arm, plan.control):
        budget = budget_pairs(plan.budget, about[one.name], about[CONTROL], one.name)
        rate = [] if arm.sets("learning_rate") else [f"learning_rate={direction.rates[one.name]:g}"]
        values.append(final_value(plan, one, [*pairs[one.name], *budget, *rate, seed], root / one.name))
    return values[0] - values[1]


def final_value(plan: ExperimentPlan, arm: Arm, pairs: Sequence[str], folder: Path) -> float:
    """The claim's metric of a run. AssertionError where it diverged."""
    record = run_arm({"recipe": plan.recipe, "pairs": list(pairs), "folder": str(folder)})
    value = read_metric(record, arm.metric or plan.claim.metric, arm.name)
    assert value is not None, f"{arm.name} diverged: {record['reason']}"
    return value


def of_today(directions: Sequence[Direction], count: int) -> list[Direction]:
    """So many, others every day."""
    start = datetime.date.today().toordinal() * count
    return [directions[(start + number) % len(directions)] for number in range(min(count, len(directions)))]


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.papers.directions", description=__doc__)
    parser.add_argument("names", nargs="*", help="claims; none: all of them")
    parser.add_argument("--count", type=int, default=0, help="so many, others every day")
    arguments = parser.parse_args(words)
    wanted: list[Any] = strong_directions()
    if unknown := set(arguments.names) - {one.paper for one in wanted}:
        parser.error(f"no strong direction on a card: {', '.join(sorted(unknown))}")
    wanted = [one for one in wanted if not arguments.names or one.paper in arguments.names]
    changed = 0
    for one in of_today(wanted, arguments.count) if arguments.count else wanted:
        cpu, found = time.process_time(), find_differences(one)
        same = statistics.mean(found) * one.sign > 0
        changed += not same
        said = "as on its card" if same else "THE OTHER DIRECTION than on its card"
        shown = ", ".join(f"{difference:+.4f}" for difference in found)
        print(f"{one.paper} {one.arm} at {one.size}: {shown}, {said}; {time.process_time() - cpu:.0f} s", flush=True)
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
