"""The learning rate as a pure function of the step: warm-up, then one of four shapes.

      cosine  ⟋‾⟍_       linear  ⟋\\_       wsd  ⟋‾‾‾‾\\_ (warm-up, stable, decay)       constant  ⟋‾‾‾‾

A schedule is `step -> multiplier of the peak rate`; resuming needs nothing from it, and a longer run is another
function. Steps are optimizer steps counted from 0, never micro-batches or epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llm_quest.errors import UsageError

LRSchedule = Callable[[int], float]


def make_lr_schedule(
    steps: int, *, warmup_steps: int = 0, shape: str = "cosine", min_lr_ratio: float = 0.0, decay_fraction: float = 0.2
) -> LRSchedule:
    """The factor on the peak learning rate at each step of a run of `steps`.

    warmup_steps: so many steps rise linearly; step 0 has 1/warmup_steps, step warmup_steps-1 has 1. min_lr_ratio:
    what is left at the end, as a part of the peak. decay_fraction: wsd falls, linearly, in this last part of the
    whole run, or from the end of the warm-up where that is later. After the last step: min_lr_ratio."""
    if shape not in SCHEDULE_SHAPES:
        raise UsageError(f"no schedule is called {shape!r}; known: {', '.join(SCHEDULE_SHAPES)}")
    if not 0 <= warmup_steps <= steps:
        raise UsageError(f"warm-up of {warmup_steps} steps does not fit a run of {steps}: choose 0 to {steps}")
    if not 0 <= min_lr_ratio <= 1 or not 0 < decay_fraction <= 1:
        raise UsageError(
            f"min_lr_ratio must lie in 0..1 (is {min_lr_ratio}) and decay_fraction in 0..1, above 0 "
            f"(is {decay_fraction})"
        )
    fall, rest = SCHEDULE_SHAPES[shape], max(1, steps - warmup_steps)
    decay = min(1.0, decay_fraction * steps / rest)  # as a part of what follows the warm-up

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / rest)
        return min_lr_ratio + (1 - min_lr_ratio) * fall(done, decay)

    return multiplier


def scale_schedule_after(rate: LRSchedule, after: int, factor: float) -> LRSchedule:
    """The same schedule, times `factor` from step `after` on."""
    return lambda step: rate(step) * (factor if step >= after else 1.0)


def cosine_decay(done: float, decay: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear_decay(done: float, decay: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - done


def wsd_decay(done: float, decay: float) -> float:
    """1, and in the last `decay` a straight line to 0: a run can be extended from before its decay."""
    return min(1.0, (1 - done) / decay)


def no_decay(done: float, decay: float) -> float:
    """1 everywhere."""
    return 1.0


SCHEDULE_SHAPES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine_decay,
    "linear": linear_decay,
    "wsd": wsd_decay,
    "constant": no_decay,
}
