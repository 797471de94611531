"""Writes the HTML page of a ladder: its curve, the prediction, the table of sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quest.experiments.ladder import describe_outcome, describe_prediction
from llm_quest.experiments.page import Table, render_experiment_page, settings_table
from llm_quest.experiments.rungs import TokenBudget
from llm_quest.experiments.scaling_law import ScalingLaw
from llm_quest.files import atomic_write_text
from llm_quest.report.plots import Curve, plot_curves

CURVE_POINTS = 40


def write_ladder_page(result: Mapping[str, Any], file: Path) -> None:
    """Write the page."""
    cards = [[describe_prediction(result), f"law: {result['law']['formula']}"]]
    if result["measured"]:
        outcome = describe_outcome(result["target"]["name"], result["prediction"], result["measured"])
        cards.append([outcome])
    text = render_experiment_page(
        title=result["question"],
        subtitle=f"{result['experiment']} · {result['metric']} · {result['parametrization']}, "
        f"scale {result['scale']}, {result['seeds']} seeds",
        heading="Prediction", cards=cards, notes=result["notes"], second="Curve",
        pictures=[("Loss against log10 of the parameters that multiply a token", draw_law(result), True)],
        tables=[("Sizes", sizes_table(result)), ("Settings", settings_table(result))], command=result["command"],
    )  # fmt: skip
    atomic_write_text(file, text)


def draw_law(result: Mapping[str, Any]) -> str:
    """Measured losses, the law and the prediction; one curve for each budget."""
    law = ScalingLaw(**{key: value for key, value in result["law"].items() if key != "formula"})
    target, curves = result["target"], []
    for color, amount in enumerate(sorted({rung["budget"]["amount"] for rung in result["rungs"]})):
        own = [rung for rung in result["rungs"] if rung["budget"]["amount"] == amount]
        budget = TokenBudget(**own[0]["budget"])
        sizes = [math.log10(rung["multiplying"]) for rung in own for _ in rung["losses"]]
        losses = [loss for rung in own for loss in rung["losses"]]
        curves.append(Curve(f"measured, {budget.words}", sizes, losses, color, show_points=True))
        begin, end = min(rung["multiplying"] for rung in own), target["multiplying"]
        along = [begin * (end / begin) ** (step / (CURVE_POINTS - 1)) for step in range(CURVE_POINTS)]
        fitted = [law.predict(n, budget.tokens(n)) for n in along]
        curves.append(Curve(f"law, {budget.words}", [math.log10(n) for n in along], fitted, color + 2))
    found, at = result["prediction"], math.log10(target["multiplying"])
    interval = [found["low"], found["loss"], found["high"]]
    curves.append(Curve("predicted", [at] * 3, interval, 4, show_points=True))
    if result["measured"]:
        losses = result["measured"]["losses"]
        curves.append(Curve("measured afterwards", [at] * len(losses), losses, 5, show_points=True))
    return plot_curves("ladder", curves, wide=True, x="log10 of parameters")


def sizes_table(result: Mapping[str, Any]) -> Table:
    """Every size, its losses, and what the others say of it."""
    head = (
        "", "parameters", "multiplying", "tokens", "steps", "rate", "FLOPs", "loss", "fitted", "from the others",
        "inside",
    )  # fmt: skip
    rows = [
        (rung["name"], f"{rung['parameters']:,}", f"{rung['multiplying']:,}", f"{rung['tokens']:,}",
         f"{rung['steps']:,}", f"{rung['learning_rate']:g}",
         f"{rung['flops']:.2e}", " ".join(f"{loss:.4f}" for loss in rung["losses"]),
         f"{rung['fitted']:.4f}", "{loss:.4f} ({low:.4f} to {high:.4f})".format(**rung["predicted_by_others"]),
         "yes" if rung["covered"] else "no")
        for rung in result["rungs"]
    ]  # fmt: skip
    return [head, *rows]
