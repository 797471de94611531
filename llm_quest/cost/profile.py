"""One training step, counted and timed. FLOPs, activations and the peak of memory are counted on the step itself
(objective, backward pass, update of the optimizer), run on tensors without memory; seconds are those of real steps."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from llm_quest.cost.flops import OperatorFlops, fake_copy, use_grouped_experts
from llm_quest.techniques.activation_checkpointing import CheckpointedForward, disable_checkpointing

TIMED_STEPS = 3
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepProfile:
    """The cost of one micro-batch and one update. flops: forward and backward, without what checkpointing computes
    again; executed_flops: with it; forward_flops: forward alone. Bytes beyond the weights: `gradients`; `activations`,
    which the forward pass leaves for the backward pass; `temporaries`, the most that comes and goes besides these, in
    the backward pass or the update; `optimizer`, its state."""

    forward_flops: int
    flops: int
    executed_flops: int
    gradients: int
    activations: int
    temporaries: int
    optimizer: int


def profile_step(
    objective: nn.Module, batch: Any, make_optimizer: MakeOptimizer | None, *, bf16: bool, mode: FakeTensorMode
) -> StepProfile:
    """Count one step of an objective on a micro-batch. Both are copied without memory, unless they were made in `mode`.
    An objective whose shapes depend on values (image placeholders) is run as it is, with a learning rate of 0."""
    try:
        fakes = fake_copy(objective, mode), fake_copy(batch, mode)
        with mode:
            use_grouped_experts(fakes[0])
            return _profile_step(*fakes, make_optimizer, bf16)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _profile_step(objective, batch.to(device_of(objective)), make_optimizer, bf16)


def _profile_step(objective: Any, batch: Any, make_optimizer: MakeOptimizer | None, bf16: bool) -> StepProfile:
    checkpointed = any(isinstance(module.forward, CheckpointedForward) for module in objective.modules())
    with disable_checkpointing(objective):
        forward, flops, tracker = count_passes(objective, batch, bf16)
    executed, state, update = flops, 0, 0
    if checkpointed:
        _, executed, tracker = count_passes(objective, batch, bf16)
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    most = tracker.peak(exclude=gradients)
    if make_optimizer is not None:
        state, update = count_update(make_optimizer(objective.model))
    objective.zero_grad()
    temporaries = max(most, update) - tracker.activations
    return StepProfile(forward, flops, executed, storage_bytes(gradients), tracker.activations, temporaries, state)


def count_passes(objective: Any, batch: Any, bf16: bool) -> tuple[int, int, StepTracker]:
    """FLOPs forward, FLOPs forward and backward, and the memory that both took. Gradients stay."""
    objective.zero_grad()
    with StepTracker() as tracker:
        with bf16_autocast(device_of(objective), bf16):
            loss = objective(batch)
        forward, tracker.activations = tracker.flops, tracker.live_bytes
        loss.total.backward()
        del loss
    return forward, tracker.flops, tracker


def count_update(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the optimizer's state, and the most that an update takes besides."""
    freeze_values(optimizer)
    with StepTracker() as tracker:
        optimizer.step()
    state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    return storage_bytes(state), tracker.peak(exclude=state)


class StepTracker(OperatorFlops):
    """Counts the FLOPs of the operators inside, and follows every storage that they make until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.events: list[tuple[int, int]] = []
        self.flops = self.live_bytes = self.activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in (*tensors_in(args), *tensors_in(kwargs.values())):
            self.note(tensor, made_here=False)
        out = func(*args, **kwargs)
        self.flops += self.count(func, args, kwargs, out)
        for tensor in tensors_in((out,)):
            self.note(tensor, made_here=True)
        return out

    def note(self, tensor: Tensor, *, made_here: bool) -> None:
        """A storage is seen; one that is an argument before any operator here made it was there already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size, number = storage.nbytes() if made_here else 0, len(self.events)
        self.events.append((number, size))
        self.live_bytes += size

        def free(_: Any) -> None:
            del self.alive[key]
            self.events.append((number, -size))
            self.live_bytes -= size

        self.alive[key] = (weakref.ref(storage, free), number)

    def peak(self, exclude: list[Tensor]) -> int:
        """The most bytes alive at once, without these tensors, which are still there."""
        left_out = {self.alive[key][1] for t in exclude if (key := t.untyped_storage()._cdata) in self.alive}
        now = most = 0
        for number, size in self.events:
            now += 0 if number in left_out else size
            most = max(most, now)
        return most


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operator, which may be in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of these tensors' storages, shared ones once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a micro-batch forward, of one forward and backward, and of an update: medians of three after one to
    warm up."""

    forward: float
    micro_batch: float
    update: float


def time_step(objective: Any, optimizer: torch.optim.Optimizer, batch: Any, bf16: bool) -> StepSeconds:
    """Run real steps, with a learning rate of 0: the model keeps its values."""
    device = device_of(objective)
    batch = batch.to(device)
    freeze_values(optimizer)

    def forward() -> Any:
        with bf16_autocast(device, bf16):
            return objective(batch)

    def backward() -> None:
        loss = forward()
        (loss.total / loss.count).backward()

    @torch.no_grad()
    def look() -> None:
        forward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    rounds = [[time_call(run, device) for run in (look, backward, update)] for _ in range(1 + TIMED_STEPS)]
    return StepSeconds(*(statistics.median(column) for column in zip(*rounds[1:], strict=True)))


def freeze_values(optimizer: torch.optim.Optimizer) -> None:
    """Updates cost what they cost and change nothing."""
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0


def time_call(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done it."""
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def bf16_autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def matmul_peak(size: int, dtype: torch.dtype, device: torch.device | str = "cpu", *, seconds: float = 0.3) -> float:
    """GFLOP/s of a size x size matrix product, the best of as many as fit the time (at least three)."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best, until, tried = float("inf"), time.perf_counter() + seconds, 0
    while tried < 3 or time.perf_counter() < until:
        best, tried = min(best, time_call(lambda: torch.mm(a, b), device)), tried + 1
    return 2 * size**3 / best / 1e9
