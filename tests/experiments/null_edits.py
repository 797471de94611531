"""Edits that change nothing that matters, and how often they are called better or worse (at most 5 %).

    python -m tests.experiments.null_edits                          10,000 simulated experiments
    python -m tests.experiments.null_edits --count 200 --out DIR    generated edits, through quest ablate
    python -m tests.experiments.null_edits --count 30 --tuned --out DIR     each arm tunes its rate first

Of ten experiments five are one edit that draws other random numbers, each time on other seeds (with --tuned: all); the
rest are comments, other names and statements in another order (`edits.py`). No two experiments share a seed. delta is
1.5 standard deviations of the difference of two unpaired runs, from a pilot on seeds that no experiment has. The same
command goes on after an interruption."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_quest.errors import UsageError
from llm_quest.experiments.code_tree import PACKAGE, own_code
from llm_quest.experiments.comparison import Claim, Comparison
from tests.experiments.bench import plan_of, run_experiment, write_text
from tests.experiments.edits import Edit, edits, write_patch
from tests.experiments.forked_pool import make_forked_pool

CYCLE = {"draws": (1, 5), "words": (2, 1), "name": (2, 1), "order": (1, 1)}
"""Ten experiments: kind -> how many edits, and how many experiments each."""
LEAST_SEED, SEEDS_EACH, PILOT_SEEDS = 401, 20, range(201, 213)
UPPER_LIMIT = 1.25
"""What a standard deviation of 12 runs is multiplied by: with the measured one itself, 7 of 30 ended undecided."""
STEPS, METRIC = 16, "eval/bits_per_byte"
BENCH = ("learning_rate=4e-3", "batch_size=4", "data.held_out=0.1")


def simulate(experiments: int, cap: int = 12, delta: float = 1.5) -> Counter[str]:
    """Outcomes of experiments whose differences are noise of standard deviation 1."""
    draw, claim = np.random.default_rng(0), Claim("loss", delta, cap, greater_is_better=False, normal=True)
    outcomes: Counter[str] = Counter()
    for _ in range(experiments):
        comparison = Comparison(claim, ["edit"])
        for seed in itertools.count(1):
            if not comparison.open_arms:
                break
            comparison.add_pair(seed, 0.0, {"edit": float(draw.standard_normal())})
        outcomes[comparison.arms["edit"].outcome] += 1
    return outcomes


def generate_edits(count: int, kinds: Sequence[str] = tuple(CYCLE), package: Path = PACKAGE) -> Iterator[Edit]:
    """The edits of so many experiments."""
    made = {kind: edits(kind, package, 0) for kind in kinds}
    endless = (
        edit
        for _ in itertools.count()
        for kind in kinds
        for edit in itertools.islice(made[kind], CYCLE[kind][0])
        for _ in range(CYCLE[kind][1])
    )
    return itertools.islice(endless, count)


class Campaign:
    """Experiments of one edit each below `root`."""

    def __init__(self, root: Path, pool: Any, *, tuned: bool):
        self.root, self.pool, self.tuned = root, pool, tuned
        root.mkdir(parents=True, exist_ok=True)
        self.text, self.done = write_text(root / "text.txt"), root / "outcomes.jsonl"

    def plan(self, number: int, patch: Path, delta: float) -> Any:
        options = {
            "arms": (), "code": (str(patch),), "metrics": (METRIC,), "delta": delta, "cap": 12, "aa_pairs": 0,
            "rates": 3 if self.tuned else 1, "tuning_seeds": 2, "budget": "steps", "question": "",
            "first_seed": LEAST_SEED + SEEDS_EACH * number,
        }  # fmt: skip
        return plan_of(self.text, self.root, STEPS, extra=BENCH, **options)

    def pilot_delta(self) -> float:
        """1.5 standard deviations of a difference of two unpaired runs, by the upper limit (80 %) of 12 runs."""
        pairs = plan_of(self.text, self.root, STEPS, extra=BENCH, arms=("x=batch_size=2",)).pairs
        asked = [{"do": "run", "recipe": "tiny", "pairs": [*pairs, f"seed={seed}"],
                  "folder": str(self.root / "pilot" / str(seed))} for seed in PILOT_SEEDS]  # fmt: skip
        records = [one.result() for one in [self.pool.submit(own_code(), request) for request in asked]]
        return float(
            f"{1.5 * UPPER_LIMIT * math.sqrt(2) * statistics.stdev(r['metrics'][METRIC] for r in records):.2g}"
        )

    def decide(self, number: int, edit: Edit, delta: float) -> dict[str, Any]:
        """The outcome of an edit."""
        patch = write_patch(edit, PACKAGE, self.root / f"{number}.patch")
        row: dict[str, Any] = {"number": number, "kind": edit.kind, "edit": edit.name, "delta": delta}
        try:
            plan = self.plan(number, patch, delta)
        except UsageError as said:
            if "no arm differs" not in str(said):
                raise
            return {**row, "outcome": "said, not run"}
        (verdict,) = run_experiment(plan, self.root, self.pool)[0]["verdicts"]
        identical = verdict["reason"] == "every pair is identical"
        return {**row, "outcome": verdict["outcome"], "pairs": verdict["pairs"], "identical": identical,
                "mean": verdict["mean"], "sd": verdict["standard_deviation"]}  # fmt: skip

    def run(self, count: int, delta: float, minutes: float) -> list[dict[str, Any]]:
        """The outcomes so far, of at most `count` edits."""
        rows = [json.loads(line) for line in self.done.read_text().splitlines()] if self.done.exists() else []
        end, before = time.monotonic() + 60 * minutes, ""
        delta = rows[0]["delta"] if rows else delta or self.pilot_delta()
        for number, edit in enumerate(generate_edits(count, ("draws",) if self.tuned else tuple(CYCLE))):
            if number < len(rows) or time.monotonic() > end:
                continue
            if edit.name != before:
                self.pool.forget_other_code()
                shutil.rmtree(self.root / "code", ignore_errors=True)
                before = edit.name
            row = self.decide(number, edit, delta)
            rows.append(row)
            with self.done.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        return rows


def describe(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The counts by kind, and of those that ran and differed."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = Counter(
            "identical in every pair" if row.get("identical") else row["outcome"] for row in rows if row["kind"] == kind
        )
        yield f"{kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in own.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=0, help="so many edits, in place of simulated experiments")
    parser.add_argument("--tuned", action="store_true", help="each arm tunes its own rate")
    parser.add_argument("--out", type=Path, default=Path("null_edits"))
    parser.add_argument("--delta", type=float, default=0.0, help="of bits per byte; by a pilot")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no experiment after so many minutes")
    options = parser.parse_args()
    if options.count:
        with make_forked_pool(1) as pool:
            rows = Campaign(options.out, pool, tuned=options.tuned).run(options.count, options.delta, options.minutes)
        print("\n".join(describe(rows)))
        outcomes = Counter(row["outcome"] for row in rows)
    else:
        outcomes = simulate(10_000)
    total = outcomes.total()
    false = outcomes["better"] + outcomes["worse"]
    print(", ".join(f"{outcome} {count / total:.1%}" for outcome, count in outcomes.most_common()), f"of {total}")
    return int(false > 0.05 * total + 2 * math.sqrt(0.05 * 0.95 * total))


if __name__ == "__main__":
    sys.exit(main())
