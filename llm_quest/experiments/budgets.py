"""Computes equal budgets: the steps of each arm, so that all spend what the control spends.

    flops        counted FLOPs of training (forward, backward, all heads): the default
    steps        the same number of steps
    tokens       the same number of tokens, or images
    seconds      seconds on this machine, measured on three steps
    parameters   the same number of steps, and parameter counts that may differ by 1 %

Each arm has a complete learning rate schedule of its own length, with the control's share of warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_quest.errors import UsageError

TOLERANCE = 0.01
"""How far a budget may be from the control's: whole steps are rarely equal."""
BUDGETS: Mapping[str, str | None] = {
    "flops": "flops_per_step", "steps": None, "tokens": "units_per_step", "seconds": "step_seconds",
    "parameters": "parameters",
}  # fmt: skip
"""Budget -> the key of an arm's description that has its cost for one step."""
Description = Mapping[str, Any]


def budget_pairs(budget: str, arm: Description, control: Description, name: str) -> tuple[str, ...]:
    """The settings that give an arm the control's budget. UsageError where that is impossible."""
    steps = equal_steps(budget, arm, control, name)
    warmup = round(steps * control["warmup_steps"] / control["max_steps"])
    same_share = arm["warmup_steps"] == control["warmup_steps"]
    return (f"max_steps={steps}", f"warmup_steps={warmup if same_share else min(arm['warmup_steps'], steps)}")


def equal_steps(budget: str, arm: Description, control: Description, name: str) -> int:
    """The number of the arm's steps that cost as much as the control's."""
    key, steps = BUDGETS[budget], int(control["max_steps"])
    if key is None:
        return steps
    if key not in arm or key not in control:
        raise UsageError(
            f"--budget {budget}: steps of this recipe can't be counted beforehand (its samples have lengths of their "
            "own); use --budget steps"
        )
    if budget == "parameters":
        require_equal_parameters(arm, control, name)
        return steps
    exact = steps * control[key] / arm[key]
    num_steps = max(1, round(exact))
    if abs(num_steps / exact - 1) > TOLERANCE:
        raise UsageError(
            f"--budget {budget} can't be equal: {name} would need {exact:.2f} steps for the control's {steps}\nmake "
            f"max_steps larger (at least {minimum_steps(exact / steps)}), or use --budget steps"
        )
    return num_steps


def minimum_steps(ratio: float) -> int:
    """Control steps from which rounding to whole steps is within the tolerance."""
    return round(0.5 / TOLERANCE / min(ratio, 1.0) + 0.5)


def require_equal_parameters(arm: Description, control: Description, name: str) -> None:
    if abs(arm["parameters"] / control["parameters"] - 1) > TOLERANCE:
        raise UsageError(
            f"--budget parameters can't be equal: {name} has {arm['parameters']:,}, the control "
            f"{control['parameters']:,}\nchange a width of the arm (model.config.intermediate_size) or use "
            "--budget flops"
        )


def shared_weights(arm: Description, control: Description) -> float:
    """The share of the arm's parameters whose first values are the control's."""
    same = [name for name, digest in arm["weights"].items() if control["weights"].get(name) == digest]
    return sum(arm["sizes"][name] for name in same) / max(1, sum(arm["sizes"].values()))
