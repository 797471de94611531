"""Predicts the loss of a planned run from a measured ladder: `quest plan --ladder FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_quest.errors import DataError, UsageError
from llm_quest.experiments.arms import resolve_settings
from llm_quest.experiments.rungs import TokenBudget, count_multiplying
from llm_quest.experiments.scaling_law import LadderPoint, equal_tokens, numbers_of_form, predict_loss
from llm_quest.files import load_json
from llm_quest.recipes.pretrain import resolve_model_config
from llm_quest.recipes.recipe import load_recipe

SHARED_SETTINGS = ("data", "tokenizer", "sequence_length", "batch_size", "optim", "lr_scheduler_type", "min_lr_ratio")
"""Settings that a ladder and the run that it predicts share."""
BUDGET_TOLERANCE = 0.1


def read_ladder(file: Path) -> dict[str, Any]:
    """The result.json of a ladder. DataError for another file."""
    found: dict[str, Any] = load_json(file, remedy="make one with quest ladder")
    try:
        for rung in found["rungs"]:
            if not (float(rung["multiplying"]) > 0 and float(rung["tokens"]) > 0):
                raise ValueError("a size of 0")
            if not rung["losses"] or not all(0 < float(loss) < 1e6 for loss in rung["losses"]):
                raise ValueError("a size without losses")
        if len(found["rungs"]) < 4 or not isinstance(found["experiment"], str):
            raise ValueError("fewer than four sizes")
        if not all(isinstance(one, str) for one in (found["recipe"], *found["settings"])):
            raise ValueError("settings that are no text")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file} is no ladder's result ({error}); make one with quest ladder") from None
    return found


def ladder_points(ladder: Mapping[str, Any]) -> list[LadderPoint]:
    return [
        LadderPoint(float(rung["multiplying"]), float(rung["tokens"]), tuple(map(float, rung["losses"])))
        for rung in ladder["rungs"]
    ]


def usual_budget(points: Sequence[LadderPoint]) -> TokenBudget:
    """The budget of a ladder that has one."""
    equal = equal_tokens(points)
    return TokenBudget(points[0].d if equal else points[0].d / points[0].n, per_parameter=not equal)


def forecast_loss(file: Path, recipe: str, pairs: Sequence[str]) -> dict[str, Any]:
    """The predicted loss of a recipe's run with its 95 % interval. UsageError for a run that the ladder says nothing
    about."""
    ladder = read_ladder(file)
    found, config, settings = load_recipe(recipe, pairs)
    if found.name != "pretrain" or config.model.load is not None:
        raise UsageError(f"--ladder {file}: ladders predict models that pretrain builds, and this run is another")
    require_alike(ladder, recipe, pairs)
    n, _ = count_multiplying(resolve_model_config(config, settings), config.sequence_length)
    tokens = config.max_steps * config.batch_size * config.sequence_length
    points = ladder_points(ladder)
    usual = usual_budget(points)
    if numbers_of_form(points) == 3 and abs(tokens / usual.tokens(n) - 1) > BUDGET_TOLERANCE:
        steps = round(usual.tokens(n) / config.batch_size / config.sequence_length)
        several = "5,10,20" if usual.per_parameter else "1M,2M,4M"
        raise UsageError(
            f"--ladder {file}: its sizes saw {usual.words}, {usual.tokens(n):,.0f} at this size, and this run sees "
            f"{tokens:,}: set max_steps={steps}, or fit several numbers: quest ladder {usual.option} {several}"
        )
    one = predict_loss(points, n, tokens)
    return {"metric": "eval/loss", "loss": one.loss, "low": one.low, "high": one.high, "ladder": ladder["experiment"]}


def require_alike(ladder: Mapping[str, Any], recipe: str, pairs: Sequence[str]) -> None:
    """UsageError where the run differs from the ladder in more than sizes."""
    theirs = resolve_settings(ladder["recipe"], tuple(ladder["settings"]))
    mine = resolve_settings(recipe, tuple(pairs))
    other = [key for key in SHARED_SETTINGS if mine.get(key) != theirs.get(key)]
    if mine["model"]["family"] != theirs["model"]["family"] or mine["model"]["preset"] != theirs["model"]["preset"]:
        other.append("model")
    if other:
        raise UsageError(
            f"the ladder {ladder['experiment']} says nothing about this run: it has another {', '.join(other)}"
        )
