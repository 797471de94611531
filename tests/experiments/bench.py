"""A small experiment on real runs, and the process that is killed in the middle of one:
`python -m tests.experiments.bench ROOT TEXT RUNS` ends by SIGKILL after so many runs."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_quest.cli.ablate import AblateOptions, make_plan
from llm_quest.experiments import measurements
from llm_quest.experiments.code_tree import PACKAGE
from llm_quest.experiments.experiment import Experiment
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.worker_pool import WorkerPool
from tests.experiments.edits import Edit, write_patch

OPTIONS = AblateOptions(
    metrics=("eval/bits_per_byte", "eval/loss"), delta=0.03, cap=8, rates=2, tuning_seeds=1,
    aa_pairs=2, question="Does a wider feed-forward network help at equal FLOPs?",
)  # fmt: skip
WIDE, SAME = "wide=model.config.intermediate_size=160", "same=model.config.intermediate_size=96"
"""96 is tiny's own width, so that arm is the control, spelled out."""
SHORT: dict[str, Any] = {
    "arms": (WIDE,), "metrics": ("eval/loss",), "rates": 1, "aa_pairs": 0, "budget": "steps", "steps": 8,
}  # fmt: skip
"""Few and short runs."""


STEPS = 40


def write_text(file: Path) -> Path:
    """Sentences of a small grammar, 30 KB."""
    nouns, verbs = ("bird", "stone", "river", "lamp", "cloud", "horse"), ("sees", "carries", "follows", "leaves")
    lines = [
        f"The {nouns[i * i % 6]} {verbs[i * i * i % 4]} the {nouns[(i * 7 + i // 5) % 6]} number {i % 23}."
        for i in range(800)
    ]
    file.write_text("\n\n".join(" ".join(lines[i : i + 8]) for i in range(0, 800, 8)))
    return file


def patch_package(patch: Path, name: str, before: str, after: str) -> str:
    """Write a patch that puts this text in place of that one in a file of the package. The path, for --code."""
    old = (PACKAGE / name).read_text(encoding="utf-8")
    assert old.count(before) == 1, f"{name} has changed"
    return str(write_patch(Edit("", "", {name: old.replace(before, after)}), PACKAGE, patch))


def settings(text: Path, steps: int = STEPS) -> list[str]:
    return [
        f"data.source={text}", "data.separator='\\n\\n'", "tokenizer.vocab_size=300", "sequence_length=32",
        "batch_size=6", "optim=adamw", f"max_steps={steps}", "warmup_steps=3", "model.config.num_hidden_layers=1",
        "samples.every_steps=0", "eval_baselines=false",
    ]  # fmt: skip


def plan_of(text: Path, root: Path, steps: int = STEPS, extra: Sequence[str] = (), **options: Any) -> Any:
    given = {**vars(OPTIONS), "arms": (WIDE, SAME), **options}
    return make_plan("tiny", [*settings(text, steps), *extra], AblateOptions(**given), root, lambda line: None)


def run_experiment(
    plan: Any, root: Path, pool: WorkerPool, *, deadline: float = math.inf
) -> tuple[dict[str, Any], list[str]]:
    """The result and the lines that were logged."""
    lines: list[str] = []
    ledger = Ledger(root / "ledger.jsonl", lines.append)
    return Experiment(plan, root, pool, ledger, lines.append, deadline=deadline).run(), lines


def main() -> None:
    """Run the short experiment until so many runs are finished, and die."""
    root, text, left = Path(sys.argv[1]), Path(sys.argv[2]), [int(sys.argv[3])]

    def die_later(*given: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    measurements.require_ended = die_later
    with WorkerPool(1) as pool:
        run_experiment(plan_of(text, root, **SHORT), root, pool)


if __name__ == "__main__":
    main()
