"""The learning rate as a pure function of the step: warm-up, then one of four shapes.

      cosine  ⟋‾⟍_       linear  ⟋\\_       wsd  ⟋‾‾‾‾\\_ (warm-up, stable, decay)       constant  ⟋‾‾‾‾

A schedule is `step -> multiplier of the peak rate`; resuming needs nothing from it, and a longer run is another
function. Steps are optimiser steps counted from 0, never micro-batches or epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llm_quest.errors import UsageError

Schedule = Callable[[int], float]


def schedule(
    steps: int, *, warmup: int = 0, shape: str = "cosine", floor: float = 0.0, decay_fraction: float = 0.2
) -> Schedule:
    """The multiplier of the peak rate at each step of a run of `steps`.

    warmup: so many steps rise linearly; step 0 has 1/warmup, step warmup-1 has 1. floor: what is left at the end, as a
    part of the peak. decay_fraction: wsd falls, linearly, in this last part of the whole run, or from the end of the
    warm-up where that is later. After the last step: floor."""
    if shape not in SHAPES:
        raise UsageError(f"no schedule is called {shape!r}; known: {', '.join(SHAPES)}")
    if not 0 <= warmup <= steps:
        raise UsageError(f"warm-up of {warmup} steps does not fit a run of {steps}: choose 0 to {steps}")
    if not 0 <= floor <= 1 or not 0 < decay_fraction <= 1:
        raise UsageError(
            f"floor must lie in 0..1 (is {floor}) and decay_fraction in 0..1, above 0 (is {decay_fraction})"
        )
    fall, rest = SHAPES[shape], max(1, steps - warmup)
    decay = min(1.0, decay_fraction * steps / rest)  # as a part of what follows the warm-up

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / rest)
        return floor + (1 - floor) * fall(done, decay)

    return multiplier


def slowed(rate: Schedule, after: int, factor: float) -> Schedule:
    """The same, times `factor` from step `after` on."""
    return lambda step: rate(step) * (factor if step >= after else 1.0)


def cosine(done: float, decay: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float, decay: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - done


def wsd(done: float, decay: float) -> float:
    """1, and in the last `decay` a straight line to 0: a run can be prolonged from before its decay."""
    return min(1.0, (1 - done) / decay)


def constant(done: float, decay: float) -> float:
    """1 throughout."""
    return 1.0


SHAPES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
}
