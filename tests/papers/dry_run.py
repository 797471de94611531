"""Every claim for real, in short: `python -m tests.papers.dry_run [NAME ...]` trains bases, control and arms for a few
steps at the smallest size, and asks for the claim's metric, other first weights or other values, and equal budgets.
About 3 s of CPU a claim; the suite has the plans alone (test_paper.py)."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quest.experiments.arms import CONTROL
from llm_quest.experiments.budgets import budget_pairs
from llm_quest.experiments.measurements import read_metric
from llm_quest.experiments.worker import describe_arm, run_arm
from llm_quest.papers import PAPERS, load_paper
from llm_quest.papers.reproduce import make_paper_plan

SHORT = {
    "pretrain": ["max_steps=3", "warmup_steps=0", "eval_tokens=2000"],
    "grpo": ["max_steps=4", "eval_problems=10", "prompts_per_rollout=4"],
    "dpo": ["max_steps=3", "warmup_steps=0", "data.max_samples=80"],
    "reward": ["max_steps=3", "warmup_steps=0", "data.max_samples=80"],
    "kto": ["max_steps=3", "warmup_steps=0", "data.max_samples=80"],
    "sft": ["max_steps=3", "warmup_steps=0"],
    "gkd": ["max_steps=2", "warmup_steps=0", "data.max_samples=80"],
    "rpt": ["max_steps=1", "warmup.pretrain.max_steps=5", "warmup.sft.max_steps=10", "eval_positions_per_bucket=5",
            "data.num_documents=300", "prompts_per_rollout=4"],
}  # fmt: skip
SHORT_BASE = {**SHORT, "grpo": ["max_steps=1", "warmup.max_steps=40", "eval_problems=5", "prompts_per_rollout=2"]}


def run_in_short(name: str, root: Path) -> str:
    """Run the arms of a claim; a line that says what they reported."""
    paper = load_paper(name)
    plan = make_paper_plan(paper, paper.all_sizes[0], lambda text: None)
    folders: dict[str, str] = {}
    for base in plan.bases:
        pairs = [*fill_in_folders(base.pairs, folders), *SHORT_BASE[base.recipe], "seed=1"]
        folder = root / f"{base.name}-{abs(hash(tuple(pairs)))}"
        if not folder.is_dir():
            run_arm({"recipe": base.recipe, "pairs": pairs, "folder": str(folder), "keep_model": True})
        folders[base.name] = str(folder)
    found: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for arm in (plan.control, *plan.arms):
        pairs = [*fill_in_folders((*plan.pairs, *arm.pairs), folders), "seed=1"]
        about[arm.name] = describe_arm({"recipe": plan.recipe, "pairs": pairs})
        if arm.name != CONTROL:
            budget_pairs(plan.budget, about[arm.name], about[CONTROL], arm.name)
            same = about[arm.name]["identity"] == about[CONTROL]["identity"]  # a teacher is part of it
            assert same or paper.metric not in ("eval/loss", "eval/perplexity"), "the arms read other tokens"
            assert arm.metric or about[arm.name]["computes"] != about[CONTROL]["computes"], "the arm is the control"
        folder = root / f"{name}-{arm.name}"
        record = run_arm({"recipe": plan.recipe, "pairs": [*pairs, *SHORT[plan.recipe]], "folder": str(folder)})
        found[arm.name] = [
            read_metric(record, metric, arm.name) for metric in (arm.metric or paper.metric, *paper.secondary)
        ]
    assert all(None not in values for values in found.values()), f"an arm diverged: {found}"
    return ", ".join(f"{arm} {values[0]:.4f}" for arm, values in found.items())


def fill_in_folders(pairs: tuple[str, ...], folders: Mapping[str, str]) -> list[str]:
    for name, folder in folders.items():
        pairs = tuple(pair.replace(f"<{name}>", folder) for pair in pairs)
    return list(pairs)


def main(names: list[str]) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names or PAPERS:
            cpu = time.process_time()
            try:
                said = run_in_short(name, Path(folder))
            except Exception as error:
                failed += 1
                said = f"FAILED: {type(error).__name__}: {error}"
            print(f"{name:<20}{time.process_time() - cpu:5.1f} s  {said}", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
