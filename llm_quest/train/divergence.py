"""DivergenceMonitor: a loss that rises far above its lowest, gradients that explode, or weights that grow within a few
steps, reported in the step in which it is certain.

    loss     7.6 5.1 3.9 3.4 3.1 3.0 3.2 6.4 6.9 7.4 7.1 7.8      7.6 first, 3.0 lowest, so 5.3 is the limit
                                   ^       1   2   3   4   5      5 steps in a row above it: reported here;
                                onset                             the checkpoint before the onset is kept

Commonly got wrong: one bad batch taken for a divergence (several steps in a row must show it), and a loss that is
compared with the lowest of single noisy steps (the lowest mean of several is taken)."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llm_quest.train.parallel import DistributedContext
from llm_quest.train.step import norm_squared

STREAK = 5
"""Steps in a row that must show it."""
MARGIN = STREAK + 2
"""Steps before the first sign in which it may have begun."""
WINDOW = 16
"""Steps whose mean is compared for the lowest."""
RISE_FACTOR, EARLY_FACTOR, RISE_NATS, RISE_SHARE, NOISE_FACTOR = 1.5, 2.0, 0.3, 0.5, 5.0
"""A loss has risen far where it is so many times its lowest (of the first loss, until WINDOW steps are done), so much
more, has lost so much of what was gained, and so many times what it varies by from step to step."""
FIRST_STEPS, EXPLOSION_FACTOR, LEAST_EXPLOSION = 8, 20.0, 20.0
"""Gradients explode where their norm is so many times that of the first steps, and so large."""
GROWTH_FACTOR, FIRST_GROWTH_STEP = 3.0, 13
"""Weights explode where their norm is so many times that of STREAK steps before. Before that step it may be so in
health: adapters begin at zero."""


@dataclass
class DivergenceMonitor:
    """`update(step, loss, grad_norm, parameter_norm)`: why this step shows that the run diverges; empty if it does not.
    Each is said once, until it is gone for STREAK steps. watch_loss: False where the loss says nothing (policy
    gradients).

    lowest: of the means of WINDOW steps, reached in lowest_step; until there is one (is_early), the first loss.
    first_norms: of the first FIRST_STEPS steps with a gradient. parameter_norms: of the last steps. onset: the last
    step at which the weights were healthy, before the present signs."""

    watch_loss: bool = True
    first_loss: float | None = None
    lowest: float = 0.0
    is_early: bool = True
    lowest_step: int = 0
    first_norms: list[float] = field(default_factory=list)
    streaks: dict[str, int] = field(default_factory=dict)
    reported: list[str] = field(default_factory=list)
    onset: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    parameter_norms: deque[float] = field(default_factory=lambda: deque(maxlen=STREAK))

    def update(self, step: int, loss: float, grad_norm: float, parameter_norm: float) -> str:
        signs = {
            "loss": self._loss_sign(step, loss) if self.watch_loss else "",
            "gradient": self._gradient_sign(grad_norm),
            "weights": self._weights_sign(step, parameter_norm),
        }
        return self._count(step, {**signs, "nonfinite": ""})

    def skip(self, step: int) -> str:
        """Update for a step whose numbers are not finite, and which updates nothing."""
        return self._count(step, {"nonfinite": f"{STREAK} steps in a row had numbers that are not finite"})

    def _count(self, step: int, signs: Mapping[str, str]) -> str:
        symptom = ""
        for name, sign in signs.items():
            self.streaks[name] = min(0, self.streaks.get(name, 0)) - 1 if not sign else self._lengthen(name, step)
            if self.streaks[name] == STREAK and name not in self.reported:
                self.reported.append(name)
                symptom = symptom or sign
            elif self.streaks[name] == -STREAK and name in self.reported:
                self.reported.remove(name)
        return symptom

    def _lengthen(self, name: str, step: int) -> int:
        if not self.is_suspect:
            self.onset = max(0, step - MARGIN)
        return max(0, self.streaks.get(name, 0)) + 1

    @property
    def is_suspect(self) -> bool:
        """Whether the newest step shows a sign."""
        return any(streak > 0 for streak in self.streaks.values())

    def healthy_until(self, step: int, *, is_last: bool = False) -> int | None:
        """The last step at which the weights are known to be healthy. None at the end of a run without signs: nothing
        later can change that."""
        if self.is_suspect or self.is_diverging:
            return self.onset
        return None if is_last else step - MARGIN

    @property
    def is_diverging(self) -> bool:
        """Whether a divergence was reported and is not over."""
        return bool(self.reported)

    def _loss_sign(self, step: int, loss: float) -> str:
        """A message if the loss is far above its lowest; empty if it is not, and the lowest is updated."""
        if not math.isfinite(loss):
            return ""
        if self.first_loss is None:
            self.first_loss, self.lowest, self.lowest_step = loss, loss, step
        limit = self._loss_limit(self.first_loss)
        if loss > limit:
            return (
                f"the loss has been above {limit:.4g} for {STREAK} steps (now {loss:.4g}; {self.lowest:.4g} at step "
                f"{self.lowest_step})"
            )
        self.recent.append(loss)
        if len(self.recent) == WINDOW and ((mean := statistics.fmean(self.recent)) < self.lowest or self.is_early):
            self.lowest, self.lowest_step, self.is_early = mean, step, False
        return ""

    def _loss_limit(self, first_loss: float) -> float:
        """The limit that a healthy loss stays below. Its noise is a standard deviation, from mean absolute
        differences."""
        steps = [abs(later - before) for before, later in itertools.pairwise(self.recent)]
        noise = statistics.fmean(steps) / 1.128 if steps else 0.0
        factor = EARLY_FACTOR if self.is_early else RISE_FACTOR
        rise = max((factor - 1) * self.lowest, RISE_NATS, RISE_SHARE * (first_loss - self.lowest), NOISE_FACTOR * noise)
        return self.lowest + rise

    def _gradient_sign(self, norm: float) -> str:
        """A message if the gradient is far larger than that of the first steps; empty if it is not."""
        if not math.isfinite(norm) or norm == 0:
            return ""
        if len(self.first_norms) < FIRST_STEPS:
            self.first_norms.append(norm)
            return ""
        usual = statistics.median(self.first_norms)
        if norm <= max(EXPLOSION_FACTOR * usual, LEAST_EXPLOSION):
            return ""
        return (
            f"the gradient's norm has been far above that of the first steps for {STREAK} steps (now {norm:.3g}, "
            f"then {usual:.3g})"
        )

    def _weights_sign(self, step: int, norm: float) -> str:
        """A message if the weights have grown faster than any useful update; empty if not. The sign stays until they
        are small again."""
        full = len(self.parameter_norms) == STREAK
        before = self.parameter_norms[0] if full else math.inf
        if step < FIRST_GROWTH_STEP or norm <= GROWTH_FACTOR * before:
            self.parameter_norms.append(norm)  # else the norms from before stay, and the sign with them
            return ""
        return f"the norm of the weights has grown from {before:.3g} to {norm:.3g} in {STREAK} steps"

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON."""
        return {"first_loss": self.first_loss, "lowest": self.lowest, "lowest_step": self.lowest_step,
                "is_early": self.is_early, "first_norms": self.first_norms, "streaks": self.streaks,
                "reported": self.reported, "onset": self.onset, "recent": list(self.recent),
                "parameter_norms": list(self.parameter_norms)}  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a saved state; an empty one is that of a new run."""
        if not state_dict:
            return
        first = state_dict["first_loss"]
        self.first_loss = None if first is None else float(first)
        self.lowest, self.lowest_step = float(state_dict["lowest"]), int(state_dict["lowest_step"])
        self.is_early = bool(state_dict["is_early"])
        self.first_norms = [float(norm) for norm in state_dict["first_norms"]][:FIRST_STEPS]
        self.streaks = {str(name): int(streak) for name, streak in state_dict["streaks"].items()}
        self.reported, self.onset = [str(name) for name in state_dict["reported"]], int(state_dict["onset"])
        self.recent = deque((float(loss) for loss in state_dict["recent"]), maxlen=WINDOW)
        self.parameter_norms = deque((float(norm) for norm in state_dict["parameter_norms"]), maxlen=STREAK)


@torch.no_grad()
def largest_gradient(model: nn.Module, parallel: DistributedContext) -> str:
    """A message that names the module with the largest gradient, and its share of the squared norm. Every process takes
    part where parameters are sharded."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if not named:
        return "no parameter has a gradient"
    squares = torch.stack([norm_squared([grad], parallel) for _, grad in named])
    if parallel.strategy == "fsdp":
        squares = parallel.all_reduce_(squares)
    shares = (squares / squares.sum()).tolist()
    share, (name, _) = max(zip(shares, named, strict=True), key=lambda pair: pair[0])
    return f"the largest gradient is in {name.rpartition('.')[0] or name} ({share:.0%} of the squared norm)"
