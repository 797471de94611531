"""Edits that change nothing that matters, and how often they are called better or worse (at most 5 %).

    python -m tests.experiments.null_edits                         10,000 simulated experiments
    python -m tests.experiments.null_edits --real 20 --out DIR     real runs: an edited package against this one

The real edits draw the same random numbers in another order, spell a name otherwise or sum in another order. The same
command goes on after an interruption."""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from llm_quest.experiments.code_tree import own_code
from llm_quest.experiments.comparison import Claim, Comparison
from llm_quest.experiments.worker_pool import WorkerPool
from tests.experiments.bench import SHORT, plan_of, run_experiment, write_text

EDITS = {
    "weights from other draws": ("recipes/model_config.py", 'derive_seed(seed, "init")', 'derive_seed(seed, "first")'),
    "rows in another order": (
        "recipes/assembly.py",
        'derive_seed(config.seed, "order")',
        'derive_seed(config.seed, "rows")',
    ),
    "a name": ("recipes/assembly.py", "whole = config.batch_size //", "whole = rows = config.batch_size //"),
}
"""Name -> (file, text, its replacement)."""
LEAST_SEED, SEEDS_EACH = 401, 20


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


def write_patch(name: str, folder: Path) -> Path:
    """The patch of an edit."""
    file, old, new = EDITS[name]
    before = (own_code().root / "llm_quest" / file).read_text(encoding="utf-8")
    assert before.count(old) == 1, f"{file}: {old}"
    paths = f"a/llm_quest/{file}", f"b/llm_quest/{file}"
    patch = folder / f"{name.replace(' ', '_')}.patch"
    patch.write_text(
        "".join(difflib.unified_diff(before.splitlines(True), before.replace(old, new).splitlines(True), *paths))
    )
    return patch


def run_real(experiments: int, root: Path, delta: float) -> Counter[str]:
    """Outcomes of real experiments on fresh seeds, one edit after another."""
    root.mkdir(parents=True, exist_ok=True)
    text, outcomes = write_text(root / "text.txt"), Counter[str]()
    patches = [write_patch(name, root) for name in EDITS]
    with WorkerPool(2) as pool:
        for number in range(experiments):
            options = {
                **SHORT,
                "arms": (),
                "code": (str(patches[number % len(patches)]),),
                "steps": 60,
                "delta": delta,
                "metrics": ("eval/bits_per_byte",),
            }
            first = LEAST_SEED + SEEDS_EACH * number
            (verdict,) = run_experiment(plan_of(text, root, **options, first_seed=first), root, pool)[0]["verdicts"]
            outcomes[verdict["outcome"]] += 1
            print(
                f"{number + 1}: {verdict['arm']}, seeds from {first}: {verdict['outcome']}, {verdict['pairs']} pairs",
                flush=True,
            )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--real", type=int, default=0, help="so many experiments of real runs, in place of simulated ones"
    )
    parser.add_argument("--out", type=Path, default=Path("null_edits"))
    parser.add_argument("--delta", type=float, default=0.02, help="of bits per byte, with --real")
    options = parser.parse_args()
    outcomes = run_real(options.real, options.out, options.delta) if options.real else simulate(10_000)
    total = outcomes.total()
    false = outcomes["better"] + outcomes["worse"]
    print(", ".join(f"{outcome} {count / total:.1%}" for outcome, count in outcomes.most_common()), f"of {total}")
    return int(false > 0.05 * total + 2 * math.sqrt(0.05 * 0.95 * total))


if __name__ == "__main__":
    sys.exit(main())
