"""RPT against its control, from the folders of finished runs:

    for S in 1 2 3; do
      quest train rpt         --out runs/rpt-$S seed=$S
      quest train rpt_control --out runs/rpt-$S-control  seed=$S rpt_run=runs/rpt-$S
      quest train rpt_control --out runs/rpt-$S-selected seed=$S rpt_run=runs/rpt-$S targets=selected
      quest train rpt         --out runs/rpt-$S-random   seed=$S reward=random model=null warmup=null \\
        model.load=runs/rpt-$S/warmup selection.proxy_model=runs/rpt-$S/base
    done
    python -m benchmarks.rpt runs/rpt-1 runs/rpt-2 runs/rpt-3 --out docs/rpt.svg

A table of held-out accuracies by bucket (mean over seeds and its 95 % interval, Student's t), and the curves of the
hard bucket over what was spent. Runs of the last two kinds may be missing."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_quest.experiments.scaling_law import student_quantile

BUCKETS = ("trivial", "easy", "medium", "hard")
ARMS = (
    ("the start, straight off", "", "before", "plain"),
    ("the start, after thinking", "", "before", "thought"),
    ("RPT, straight off", "", "after", "plain"),
    ("RPT, after thinking", "", "after", "thought"),
    ("control, all tokens: straight off", "-control", "after", "plain"),
    ("control, all tokens: after thinking", "-control", "after", "thought"),
    ("control, selected places: straight off", "-selected", "after", "plain"),
    ("RPT under a coin's rewards, after thinking", "-random", "after", "thought"),
)
CURVES = (
    ("RPT, after thinking", "", "thought_hard", "#3b6fb5"),
    ("control (all tokens), straight off", "-control", "plain_hard", "#c2571a"),
    ("control (selected places), straight off", "-selected", "plain_hard", "#7a7a7a"),
)


@dataclass(frozen=True)
class MeanInterval:
    """A mean over seeds with the half width of its 95 % interval by Student's t (infinite for one seed)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ± {self.half_width:.2g}" if math.isfinite(self.half_width) else "")


def mean_interval(values: Sequence[float]) -> MeanInterval:
    if len(values) < 2:
        return MeanInterval(values[0], math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return MeanInterval(statistics.fmean(values), student_quantile(len(values) - 1) * error)


def share(run: str, when: str, kind: str, bucket: str) -> float:
    tables = json.loads(Path(run, "foretold.json").read_text())
    found = next(one for one in tables[when]["buckets"] if one["name"] == bucket)
    return float(found[kind]["share"])


def table(runs: Sequence[str]) -> Iterator[str]:
    yield f"| held out | {' | '.join(BUCKETS)} |"
    yield "| --- " * (len(BUCKETS) + 1) + "|"
    for name, suffix, when, kind in ARMS:
        there = [run + suffix for run in runs if Path(run + suffix, "foretold.json").is_file()]
        if len(there) == len(runs):
            spans = [mean_interval([share(run, when, kind, bucket) for run in there]) for bucket in BUCKETS]
            yield f"| {name} | {' | '.join(map(shown, spans))} |"
    gains = [share(run, "after", "thought", "hard") - share(f"{run}-control", "after", "plain", "hard") for run in runs]
    yield f"\nRPT (after thinking) less its control (straight off), hard, paired by seed: {mean_interval(gains)}"
    for run in runs:
        told = [f"{name}: {share(run + suffix, when, kind, 'hard'):.3f}" for name, suffix, when, kind in ARMS[:5]]
        yield f"{run}, hard: {'; '.join(told)}"


def shown(one: MeanInterval) -> str:
    return f"{one.mean:.3f}" + (f" ± {one.half_width:.3f}" if math.isfinite(one.half_width) else "")


def points(run: str, number: str) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [(row["teraflops"], row[f"eval/{number}"]) for row in rows if f"eval/{number}" in row]


def draw(runs: Sequence[str], file: str) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "rpt", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for name, suffix, number, color in CURVES:
            there = [run for run in runs if Path(run + suffix, "metrics.jsonl").is_file()]
            for place, run in enumerate(there):
                began = (0.0, share(run, "before", number.partition("_")[0], "hard"))
                line = [began, *points(run + suffix, number)]
                axes.plot(*zip(*line, strict=True), color=color, alpha=0.8, label=None if place else name)
        axes.set_xlabel("teraflops spent after the start")
        axes.set_ylabel("hard places foretold, held out")
        axes.set_ylim(0, 1.02)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", help="an SVG of the curves")
    given = parser.parse_args()
    print("\n".join(table(given.runs)))
    if given.out:
        draw(given.runs, given.out)


if __name__ == "__main__":
    main()
