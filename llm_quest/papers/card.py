"""The card of a paper: claim, experiment, criteria, verdict, plot and table as Markdown."""

from __future__ import annotations

import datetime
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.files import atomic_write_text
from llm_quest.papers.paper import ExperimentResults, Paper, Verdict

CURVE_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e")


@dataclass(frozen=True)
class PaperCard:
    """The result of `quest reproduce`."""

    paper: Paper
    results: ExperimentResults
    verdict: Verdict
    file: Path

    def as_json(self) -> dict[str, Any]:
        numbers = {
            arm: {number: self.results.values(arm, number) for number in number_names(self.results, arm)}
            for arm in self.results.arms
        }
        return {
            "paper": self.paper.name, "outcome": self.verdict.outcome, "words": self.verdict.explanation,
            "numbers": numbers, "card": str(self.file),
        }  # fmt: skip

    def lines(self) -> list[str]:
        result = [f"{self.paper.title} (arXiv:{self.paper.arxiv})", self.paper.claim, ""]
        return [*result, *results_table(self.results), "", str(self.verdict), f"card: {self.file}"]


def write_card(paper: Paper, results: ExperimentResults, out: Path) -> PaperCard:
    """Decides the verdict, plots the curves and writes the card."""
    verdict = paper.verdict(results)
    plot_experiment(paper, results, out / f"{paper.name}.svg")
    file = out / f"{paper.name}.md"
    atomic_write_text(file, card_markdown(paper, results, verdict))
    return PaperCard(paper, results, verdict, file)


def card_markdown(paper: Paper, results: ExperimentResults, verdict: Verdict) -> str:
    """The text of the card."""
    seeds = len(next(iter(results.arms.values())))
    parts = [
        f"# {paper.title}\n\n[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})",
        f"**Claim.** {paper.claim}",
        f"**Experiment.** {paper.experiment}",
        f'**Confirmed if** {paper.confirms}\n**Refuted if** {paper.refutes}\nAnything between is "no effect seen".',
        f"## Verdict: {verdict.outcome}\n\n{verdict.explanation}",
        f"![{paper.plot.y} against {paper.plot.x}]({paper.name}.svg)",
        "\n".join(results_table(results)),
        f"Means over {seeds} seeds with 95 % intervals. Measured on {datetime.date.today().isoformat()} by "
        f"`quest reproduce {paper.name} --seeds {seeds}`; all numbers are in [{paper.name}.json]({paper.name}.json).",
    ]
    return "\n\n".join([*parts, *([paper.notes] if paper.notes else [])]) + "\n"


def results_table(results: ExperimentResults) -> list[str]:
    """A Markdown table with a row for each arm and a column for each number."""
    names = list(dict.fromkeys(name for arm in results.arms for name in number_names(results, arm)))
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for arm in results.arms:
        own = number_names(results, arm)
        rows.append([arm, *(str(results.interval(arm, name)) if name in own else "" for name in names)])
    return [f"| {' | '.join(row)} |" for row in rows]


def number_names(results: ExperimentResults, arm: str) -> Sequence[str]:
    return list(next(iter(results.arms[arm].values())).numbers)


def plot_experiment(paper: Paper, results: ExperimentResults, file: Path) -> None:
    """Writes the plot as SVG: thin lines for the seeds of an arm, a thick line for their mean."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": paper.name, "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.8), layout="tight")
        axes = figure.add_subplot()
        for number, (arm, seeds) in enumerate(results.arms.items()):
            lines = [measured.curve for measured in seeds.values() if measured.curve]
            for line in lines:
                axes.plot(
                    *zip(*line, strict=True),
                    color=CURVE_COLOURS[number % len(CURVE_COLOURS)],
                    linewidth=0.7,
                    alpha=0.35,
                )
            if lines:
                style = "-" if number < len(CURVE_COLOURS) else "--"
                axes.plot(
                    *mean_curve(lines), style, color=CURVE_COLOURS[number % len(CURVE_COLOURS)], linewidth=2, label=arm
                )
        axes.set_xlabel(paper.plot.x)
        axes.set_ylabel(paper.plot.y)
        if paper.plot.log:
            axes.set_yscale("log")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    atomic_write_text(file, drawn.getvalue())


def mean_curve(lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """The mean of curves, up to the length of the shortest and without points that are not finite."""
    length = min(len(line) for line in lines)
    columns = [[line[place] for line in lines] for place in range(length)]
    points = [(column[0][0], sum(y for _, y in column) / len(column)) for column in columns]
    shown = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in shown], [y for _, y in shown]


VERDICTS = Path(__file__).with_name("verdicts.json")
"""Name -> outcome of the cards in docs/papers, which a wheel does not contain."""


def recorded_verdict(docs: Path, name: str) -> str:
    """The outcome of the card in `docs`, otherwise the one shipped with the package; empty without either."""
    return outcome_of_card(docs, name) or str(json.loads(VERDICTS.read_text(encoding="utf-8")).get(name, ""))


def outcome_of_card(docs: Path, name: str) -> str:
    """The outcome that a card in `docs` states; empty without a card."""
    file = docs / f"{name}.md"
    if not file.is_file():
        return ""
    found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("## Verdict: ")]
    return found[0].removeprefix("## Verdict: ") if found else ""
