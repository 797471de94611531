"""A preference loss by its name, with the numbers that it takes: what each means, its range, and what is refused.

Commonly got wrong: a number that the chosen loss does not read is refused, since a run with it would look tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import NamedTuple

from llm_quest.errors import UsageError
from llm_quest.objectives.preference_losses import PREFERENCE_LOSSES, PairwiseLoss


def make_preference_loss(name: str, **numbers: float) -> PairwiseLoss:
    """The loss of this name with the numbers that are given; UsageError for one that it has no use for, that it lacks,
    or that is out of range."""
    if name not in PREFERENCE_LOSSES:
        raise UsageError(f"no preference loss is called {name!r}; known: {', '.join(PREFERENCE_LOSSES)}")
    if without_effect := [one for one in numbers if one not in loss_numbers(name)]:
        raise UsageError(refuse_number(without_effect[0], numbers[without_effect[0]], name))
    for one, required in loss_numbers(name).items():
        if required and one not in numbers:
            raise UsageError(f"loss_type={name} needs {one}, {NUMBER_RANGES[one].meaning}")
    for one, value in numbers.items():
        number = NUMBER_RANGES[one]
        if not number.low < value < number.high:
            raise UsageError(f"{one} is {value}; loss_type={name} needs {one}, {number.meaning}")
    loss: PairwiseLoss = PREFERENCE_LOSSES[name](**numbers)
    return loss


def loss_numbers(name: str) -> Mapping[str, bool]:
    """The numbers of a loss, and whether they must be given."""
    return {field.name: field.default is MISSING for field in fields(PREFERENCE_LOSSES[name])}


def refuse_number(number: str, value: float, name: str) -> str:
    able = " or ".join(other for other in PREFERENCE_LOSSES if number in loss_numbers(other))
    cure = f"take loss_type={able}, or leave it out" if able else f"it has {', '.join(loss_numbers(name))}"
    return f"{number} {value} has no effect on loss_type={name}; {cure}"


class NumberRange(NamedTuple):
    """An open interval, and what the number means."""

    low: float
    high: float
    meaning: str


NUMBER_RANGES: dict[str, NumberRange] = {
    "beta": NumberRange(0, math.inf, "the strength of the reference, above 0"),
    "label_smoothing": NumberRange(0, 0.5, "the part of wrong labels, above 0 and below 0.5"),
    "simpo_gamma": NumberRange(-math.inf, math.inf, "the target margin of the rewards"),
    "discopop_tau": NumberRange(0, math.inf, "the width of the transition, above 0"),
}
