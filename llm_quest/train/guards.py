"""Guards against numbers that are not finite. A loss or a gradient: the update is skipped, counted and logged with the
module where it began; too many in a row stop the run. A weight, or the optimizer's state: the run stops in that step,
and is not saved.

The loop reads one small tensor per step; everything here is decided from those few numbers on the host."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_quest.contracts import Loss
from llm_quest.errors import UsageError
from llm_quest.train.optimizers import trainable_parameters
from llm_quest.train.parallel import local_tensor
from llm_quest.train.step import autocast

MAX_PLAUSIBLE_WEIGHT = 1e12
"""No trained weight is so large; its square is still a float32."""
NO_CULPRIT = "no module, this time"


@dataclass
class NonFiniteGuard:
    """Counts the steps whose loss or gradient is not finite, and those without a target. skipped, empty: how many so
    far; nonfinite_streak, empty_streak: how many of the last ones in a row."""

    max_bad: int
    max_empty: int
    skipped: int = 0
    empty: int = 0
    nonfinite_streak: int = 0
    empty_streak: int = 0

    def refusal_reason(self, loss: float, grad_norm: float, count: float) -> str:
        """The reason why this step must not update the model; empty if it may."""
        nothing = count == 0
        bad = not nothing and not (math.isfinite(loss) and math.isfinite(grad_norm))
        self.empty, self.empty_streak = self.empty + nothing, self.empty_streak + 1 if nothing else 0
        self.skipped, self.nonfinite_streak = self.skipped + bad, self.nonfinite_streak + 1 if bad else 0
        if nothing:
            return "nothing to learn: no target in any micro-batch"
        return f"loss {loss}, gradient norm {grad_norm}" if bad else ""

    @property
    def stop_reason(self) -> str:
        """The reason why the run must stop; empty if it may go on."""
        if self.nonfinite_streak > self.max_bad:
            return f"{self.nonfinite_streak} steps in a row had a loss or gradient that is not finite"
        if self.empty_streak > self.max_empty:
            return f"{self.empty_streak} steps in a row had nothing to learn: every target is masked"
        return ""

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("max_")}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        for name in self.state_dict():
            setattr(self, name, state_dict[name])


def initial_loss_warning(loss: float, expected: float) -> str:
    """A warning if the first loss is further than a fifth from what is expected (ln V for random weights); else
    empty."""
    if abs(loss - expected) <= 0.2 * abs(expected):
        return ""
    return f"the first loss is {loss:.3f}, expected about {expected:.3f}: look at the initialization and at the targets"


def find_bad_parameter(model: nn.Module) -> str:
    """The first parameter that is not finite, or holds a weight beyond MAX_PLAUSIBLE_WEIGHT; empty if all are right."""
    named = list(model.named_parameters())
    largest = torch.stack([_largest(p) for _, p in named]).tolist() if named else []
    for (name, _), value in zip(named, largest, strict=True):
        if not value <= MAX_PLAUSIBLE_WEIGHT:
            return f"parameter {name} {f'holds {value:.3g}' if math.isfinite(value) else 'is not finite'}"
    return ""


def find_bad_optimizer_state(model: nn.Module, optimizer: Optimizer) -> str:
    """The first state of an optimizer that is not finite; empty if all are."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and not torch.isfinite(local_tensor(value)).all():
                return f"the optimizer's {key} of {name} is not finite"
    return ""


def _largest(parameter: Tensor) -> Tensor:
    """The largest absolute value of this process's part; NaN where there is one."""
    tensor = local_tensor(parameter.detach())
    if not tensor.numel():
        return torch.zeros((), device=tensor.device)
    least, most = torch.aminmax(tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor)
    return torch.maximum(most.float(), -least.float())


def suggest_remedies(learning_rate: float, precision: str, max_grad_norm: float | None) -> str:
    """A sentence of advice for a run whose numbers are not finite or explode."""
    clipping = "set max_grad_norm=1.0, " if max_grad_norm is None else ""
    exact = "set precision=fp32, " if precision != "fp32" else ""
    return f"Lower learning_rate (now {learning_rate:.1e}), {clipping}{exact}or look at the data of this step"


def find_first_nonfinite(objective: nn.Module, batches: Sequence[Any], forward: Callable[[Any], Loss]) -> str:
    """Run a step again with hooks and name where the first number that is not finite appears: a parameter, a
    module's output, or the gradient that passes through a module. Empty if all is finite this time. Leaves gradients
    behind. Every batch is run, because the processes of FSDP2 communicate in each."""
    if culprit := find_bad_parameter(objective):
        return culprit
    with warnings.catch_warnings(), _record_nonfinite(objective) as seen:
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        for batch in batches:
            forward(batch).total.backward()
    named = reversed(list(objective.named_parameters()))
    broken = (name for name, p in named if p.grad is not None and not _all_finite(p.grad))
    return next(iter(seen), "") or next((f"gradient of {name}" for name in broken), "")


@contextmanager
def _record_nonfinite(objective: nn.Module) -> Iterator[list[str]]:
    """Collect, in order of appearance, what is not finite. A module inside another one comes first, because it
    finishes first."""
    seen: list[str] = []
    handles = []
    for name, module in objective.named_modules():
        label = f"{name or 'the objective'} ({type(module).__name__})"
        handles.append(module.register_forward_hook(_forward_hook(f"output of {label}", seen)))
        if name:
            handles.append(module.register_full_backward_hook(_backward_hook(f"gradient through {label}", seen)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(label: str, seen: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, seen_in: Any, out: Any) -> None:
        if not _all_finite(out):
            seen.append(label)

    return hook


def _backward_hook(label: str, seen: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, below: Any, above: Any) -> None:
        if not _all_finite(below) and _all_finite(above):
            seen.append(label)

    return hook


def _all_finite(thing: Any) -> bool:
    """Whether every floating-point tensor in a module's output or gradients is finite."""
    if isinstance(thing, Tensor):
        return not thing.is_floating_point() or bool(torch.isfinite(local_tensor(thing.detach())).all())
    if isinstance(thing, (tuple, list)):
        return all(_all_finite(part) for part in thing)
    return True


def require_fp32_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters. UsageError if they are 16-bit: updates smaller than a 500th of a weight would be
    rounded away."""
    learned = trainable_parameters(model)
    small = [name for name, p in learned.items() if p.dtype not in (torch.float32, torch.float64)]
    if small:
        raise UsageError(
            f"{len(small)} trainable parameters are {learned[small[0]].dtype} (first: {small[0]}): small updates "
            "would be rounded away; load the model as float32 and set precision=bf16"
        )
    return list(learned.values())


def find_culprit(objective: nn.Module, batches: Sequence[Any], precision: str, device: torch.device) -> str:
    """Locate the first number of a step that is not finite, in words."""
    objective.zero_grad(set_to_none=True)
    try:
        with autocast(precision, device):
            culprit = find_first_nonfinite(objective, [batch.to(device) for batch in batches], objective.forward)
    except RuntimeError as error:
        return f"unknown: running the step again failed ({error})"
    return culprit or NO_CULPRIT


def describe_good_checkpoint(checkpoint_path: str) -> str:
    """A sentence that names the checkpoint from which a stopped run resumes."""
    if not checkpoint_path:
        return "No checkpoint was saved before, so the run starts again (save_steps, save_minutes)"
    return f"The last good checkpoint is {checkpoint_path}; the same command goes on from it"
