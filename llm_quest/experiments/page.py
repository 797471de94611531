"""Writes the HTML page of an experiment: verdicts, paired differences, evidence, training curves, tuning, costs. The
page loads nothing else and has no script."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_quest.experiments.arms import CONTROL
from llm_quest.experiments.verdict_lines import describe_verdict
from llm_quest.files import atomic_write_text, damaged_file_errors, iter_lines
from llm_quest.report import render_template
from llm_quest.report.plots import Curve, plot_curves

TEMPLATE = Path(__file__).with_name("page.html")
Table = list[tuple[str, ...]]


def write_experiment_page(result: Mapping[str, Any], root: Path, file: Path) -> None:
    """Write the page. root: the folder of the runs."""
    claim = result["claim"]
    text = render_experiment_page(
        title=result["question"] or result["experiment"],
        subtitle=f"{result['experiment']} · {claim['metric']}, delta {claim['delta']}, at most {claim['cap']} pairs · "
        f"equal {result['budget']}",
        heading="Verdicts",
        cards=[describe_verdict(verdict) for verdict in result["verdicts"]],
        notes=result["notes"],
        second="Pairs",
        pictures=draw_experiment_plots(result, root),
        tables=[
            ("Arms", arms_table(result)),
            ("Learning rates", rates_table(result)),
            ("Settings", settings_table(result)),
        ],
        command=result["command"],
    )
    atomic_write_text(file, text)


def render_experiment_page(*, pictures: Iterable[tuple[str, str, bool]], **content: Any) -> str:
    """The page from its template. pictures: (heading, svg, whether it takes the whole width)."""
    from markupsafe import Markup

    drawn = [(heading, Markup(svg), wide) for heading, svg, wide in pictures if svg]
    return render_template(TEMPLATE, pictures=drawn, **content)


def draw_experiment_plots(result: Mapping[str, Any], root: Path) -> Iterator[tuple[str, str, bool]]:
    """(heading, svg, whether it takes the whole width)."""
    claim, verdicts = result["claim"], result["verdicts"]
    differences = [
        Curve(v["arm"], pair_numbers(v), v["differences"], place, show_points=True)
        for place, v in enumerate(verdicts, 1)
    ]
    heading = f"Paired differences in {claim['metric']}, arm - control"
    yield heading, plot_curves("paired differences", differences, level=("0", 0.0), x="pair"), False
    evidence = [
        Curve(v["arm"], pair_numbers(v), v["evidence"], place, show_points=True) for place, v in enumerate(verdicts, 1)
    ]
    if verdicts:
        level = ("threshold", verdicts[0]["threshold"])
        yield "Evidence for an effect", plot_curves("evidence", evidence, log=True, level=level, x="pair"), False
    curves = [mean_curve(name, runs, place, root) for place, (name, runs) in enumerate(runs_by_arm(result).items())]
    yield "Training loss, mean over seeds", plot_curves("training loss", curves, wide=True), True


def pair_numbers(verdict: Mapping[str, Any]) -> list[float]:
    return [float(number) for number in range(1, len(verdict["differences"]) + 1)]


def runs_by_arm(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Arm -> its runs, the control first."""
    by_arm: dict[str, list[str]] = {CONTROL: []}
    for verdict in result["verdicts"]:
        for name, runs in verdict["runs"].items():
            by_arm[name] = runs
    return by_arm


def mean_curve(name: str, runs: Sequence[str], color: int, root: Path) -> Curve:
    """The mean of the runs' training losses at the steps that all of them logged."""
    losses = [read_losses(root / "runs" / run / "metrics.jsonl") for run in runs]
    steps = sorted(set.intersection(*map(set, losses))) if losses else []
    values = [statistics.fmean(loss[step] for loss in losses) for step in steps]
    return Curve(name, steps, values, color, smooth=True)


def read_losses(file: Path) -> dict[int, float]:
    """Step -> training loss of a run; NaN where it was not finite."""
    if not file.is_file():
        return {}
    with damaged_file_errors(file, "remove it, and the page does without"), file.open("rb") as handle:
        rows = [json.loads(line) for _, line in iter_lines(handle)]
        return {row["step"]: math.nan if row.get("loss") is None else row["loss"] for row in rows if "loss" in row}


def arms_table(result: Mapping[str, Any]) -> Table:
    """The table of the arms: size, cost, rate, mean and settings."""
    head = ("", "parameters", "steps", "FLOPs", "first weights shared", "learning rate", "mean", "settings", "code")
    return [head, *(arm_row(name, arm, result) for name, arm in result["arms_measured"].items())]


def arm_row(name: str, arm: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    values = [value for value in arm["values"] if value is not None]
    flops = f"{arm['flops']:.3g}" if arm["flops"] else "not counted"
    own = " ".join(pair for pair in result["arms"][name]["settings"])
    mean = f"{statistics.fmean(values):.4f} ({len(values)} runs)" if values else ""
    return (
        name, f"{arm['parameters']:,}", f"{arm['steps']:,}", flops, f"{arm['shared_weights']:.0%}",
        f"{arm['learning_rate']:g}", mean, own, f"{arm['code']} {arm['revision']}",
    )  # fmt: skip


def rates_table(result: Mapping[str, Any]) -> Table:
    """The metric at each learning rate that was tried."""
    searched = {name: arm["rates"] for name, arm in result["arms_measured"].items() if arm["rates"]}
    rates = sorted({rate for losses in searched.values() for rate in losses}, key=float)
    shown = {
        name: [f"{losses[rate]:.4f}" if isinstance(losses.get(rate), float) else losses.get(rate, "") for rate in rates]
        for name, losses in searched.items()
    }
    return [("", *rates), *((name, *cells) for name, cells in shown.items())]


def settings_table(result: Mapping[str, Any]) -> Table:
    """The settings that all arms have."""
    return [(key, value) for key, _, value in (pair.partition("=") for pair in result["settings"])]
