"""Numbers that are not finite: the update is skipped, counted and shown; too many in a row stop the run and name the
module.

The loop reads one small tensor per step; everything here is decided from those few numbers on the host."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_quest.contracts import Loss
from llm_quest.train.parallel import local


@dataclass
class Guard:
    """Judges every step. skipped, empty: how many so far; bad_run, empty_run: how many of the last ones in a row."""

    max_bad: int
    max_empty: int
    skipped: int = 0
    empty: int = 0
    bad_run: int = 0
    empty_run: int = 0

    def judge(self, loss: float, norm: float, count: float) -> str:
        """Why this step must not change the model; empty if it may."""
        nothing = count == 0
        bad = not nothing and not (math.isfinite(loss) and math.isfinite(norm))
        self.empty, self.empty_run = self.empty + nothing, self.empty_run + 1 if nothing else 0
        self.skipped, self.bad_run = self.skipped + bad, self.bad_run + 1 if bad else 0
        if nothing:
            return "nothing to learn: no target in any micro-batch"
        return f"loss {loss}, gradient norm {norm}" if bad else ""

    @property
    def fatal(self) -> str:
        """Why the run must stop; empty if it may go on."""
        if self.bad_run > self.max_bad:
            return f"{self.bad_run} steps in a row had a loss or gradient that is not finite"
        if self.empty_run > self.max_empty:
            return f"{self.empty_run} steps in a row had nothing to learn: every target is masked"
        return ""

    def counts(self) -> dict[str, int]:
        """For the checkpoint."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("max_")}


def surprising(loss: float, expected: float) -> str:
    """A first loss further than a fifth from what is expected (ln V for random weights), in words; else empty."""
    if abs(loss - expected) <= 0.2 * abs(expected):
        return ""
    return f"the first loss is {loss:.3f}, expected about {expected:.3f}: look at the initialisation and at the targets"


def not_finite(model: nn.Module) -> str:
    """The first parameter that is not finite; empty if all are."""
    named = list(model.named_parameters())
    fine = torch.stack([torch.isfinite(local(p.detach())).all() for _, p in named]).tolist() if named else []
    return next((f"parameter {name}" for (name, _), good in zip(named, fine, strict=True) if not good), "")


def first_bad(objective: nn.Module, batches: Sequence[Any], forward: Callable[[Any], Loss]) -> str:
    """Run a step again with hooks and name where the first number that is not finite appears: a parameter, a module's
    output, or the gradient that a module passes down. Empty if all is well this time. Leaves gradients behind."""
    if found := not_finite(objective):
        return found
    for batch in batches:
        with warnings.catch_warnings(), _watched(objective) as seen:
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            forward(batch).total.backward()
        if seen:
            return seen[0]
    named = reversed(list(objective.named_parameters()))
    broken = (name for name, p in named if p.grad is not None and not _finite(p.grad))
    return next((f"gradient of {name}" for name in broken), "")


@contextmanager
def _watched(objective: nn.Module) -> Iterator[list[str]]:
    """Collects, in order of appearance, what is not finite. A module inside another one comes first: it finishes
    first."""
    seen: list[str] = []
    handles = []
    for name, module in objective.named_modules():
        label = f"{name or 'the objective'} ({type(module).__name__})"
        handles.append(module.register_forward_hook(_look(f"output of {label}", seen)))
        if name:
            handles.append(module.register_full_backward_hook(_look_back(f"gradient through {label}", seen)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _look(label: str, seen: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, seen_in: Any, out: Any) -> None:
        if not _finite(out):
            seen.append(label)

    return hook


def _look_back(label: str, seen: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, below: Any, above: Any) -> None:
        if not _finite(below) and _finite(above):
            seen.append(label)

    return hook


def _finite(thing: Any) -> bool:
    """Of every floating tensor in a module's output or gradients."""
    if isinstance(thing, Tensor):
        return not thing.is_floating_point() or bool(torch.isfinite(local(thing.detach())).all())
    if isinstance(thing, (tuple, list)):
        return all(_finite(part) for part in thing)
    return True
