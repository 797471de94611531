"""The cost of a run before it starts: `quest plan`. One optimizer step is counted, not guessed (`profile.py`):

- FLOPs: of the objective's forward and backward pass. What activation checkpointing computes again is time and no work.
- Memory of one process: weights, gradients, the optimizer's state, what the forward pass leaves for the backward pass
  (activations), the most that comes and goes besides (temporaries), and models that are not trained.
- Time: a few real steps, or the machine's matrix-product rate and the share of it that training reaches.

FSDP shares out weights, gradients and state; DDP keeps a copy of the gradients in its buckets. What FSDP gathers of one
block at a time is not counted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_quest.contracts import LogFn
from llm_quest.cost.profile import TIMED_STEPS, MakeOptimizer, StepProfile, matmul_peak, profile_step, time_step
from llm_quest.formatting import align_columns, format_bytes, format_duration, format_quantity

EXPECTED_UTILIZATION = 0.5
USABLE_MEMORY = 0.9


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of one process in a run.

    make_objective: the objective with its model, which may exist already; called with False in a FakeTensorMode to be
    counted, where values are not filled in, and with True to be timed. batch: the largest micro-batch; it holds
    `batch_units` tokens or images (`unit`). units_per_step: of an optimizer step, over all processes. step_work: the
    same in words. frozen: models that are not trained. forward_passes_first: how many batches like this one are scored
    before the first step. strategy: ddp or fsdp, where there are several processes. remedies: what a user may change to
    save memory."""

    family: str
    make_objective: Callable[[bool], Any]
    make_optimizer: MakeOptimizer
    batch: Any
    batch_units: int
    unit: str
    units_per_step: float
    step_work: str
    steps: int
    bf16: bool
    device: torch.device
    save_total_limit: int
    epochs: float | None = None
    world_size: int = 1
    strategy: str = "ddp"
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    forward_passes_first: float = 0.0
    remedies: tuple[str, ...] = ()

    @property
    def micro_batches(self) -> float:
        """Batches like this one in a step of one process; a fraction where others are smaller."""
        return self.units_per_step / self.world_size / self.batch_units


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a run. flops: of the whole run, `first_flops` of them before the first step. memory: bytes by kind
    on one process. step_seconds: measured if `measured`, else predicted from `peak_gflops`; how: in words."""

    model: str
    parameters: int
    trainable: int
    unit: str
    units_per_step: float
    step_work: str
    steps: int
    flops: float
    first_flops: float = 0.0
    memory: dict[str, int]
    memory_available: int
    checkpoint_bytes: int
    disk_bytes: int
    precision: str
    peak_gflops: float
    measured: bool
    how: str
    step_seconds: float
    first_seconds: float = 0.0
    world_size: int = 1
    epochs: float | None = None
    remedies: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_total <= USABLE_MEMORY * self.memory_available

    @property
    def flops_per_step(self) -> float:
        return (self.flops - self.first_flops) / self.steps

    @property
    def seconds(self) -> float:
        return self.first_seconds + self.steps * self.step_seconds

    @property
    def utilization(self) -> float:
        """Share of the matrix-product peak that a step reaches."""
        return self.flops_per_step / self.world_size / self.step_seconds / 1e9 / self.peak_gflops

    @property
    def warnings(self) -> tuple[str, ...]:
        """What does not fit, with the cheapest remedies first."""
        if self.fits:
            return ()
        needed, there = format_bytes(self.memory_total), format_bytes(self.memory_available)
        remedies = ", ".join((*self.remedies, "a smaller model"))
        return (f"{needed} of memory are needed and {there} are available; cheapest remedies: {remedies}",)

    def as_json(self) -> dict[str, Any]:
        units, total = f"{self.unit}s", self.units_per_step * self.steps
        return {
            **{name: value for name, value in dataclasses.asdict(self).items() if name not in HIDDEN},
            **self.details,
            f"{units}_per_step": self.units_per_step,
            units: total,
            f"{units}_per_parameter": total / self.parameters,
            f"{units}_per_second": self.units_per_step / self.step_seconds,
            f"flops_per_{self.unit}": self.flops_per_step / self.units_per_step,
            **{name: getattr(self, name) for name in COMPUTED},
        }

    def lines(self) -> list[str]:
        """The plan as lines for the screen."""
        units, total = f"{self.unit}s", round(self.units_per_step * self.steps)
        trained = "" if self.trainable == self.parameters else f", {self.trainable:,} of them trained"
        seen = f"{total / self.parameters:.3g} per parameter" if self.epochs is None else f"{self.epochs:.3g} epochs"
        each = f"{self.flops_per_step / self.units_per_step / 1e6:,.4g} M for each {self.unit}"
        speed = f"{self.units_per_step / self.step_seconds:,.0f} {units}/s, {self.utilization:.0%} of the peak"
        first = f"{self.first_flops:.3g} FLOPs, about {format_duration(self.first_seconds)}"
        available = f"{format_bytes(self.memory_total)} of {format_bytes(self.memory_available)} available now"
        facts = [
            ("model", f"{self.model}, {self.parameters:,} parameters{trained}"),
            ("work", f"{self.steps:,} steps of {self.step_work} = {format_quantity(total)} {units}, {seen}"),
            ("FLOPs", f"{each}, {self.flops_per_step / 1e9:,.4g} G a step, {self.flops:.3g} in all"),
            *([("before: the reference", first)] if self.first_flops else []),
            *((f"memory: {kind}", format_bytes(num_bytes)) for kind, num_bytes in self.memory.items()),
            ("memory: together", available),
            ("a checkpoint", f"{format_bytes(self.checkpoint_bytes)}; {format_bytes(self.disk_bytes)} on disk at most"),
            ("matrix products", f"{self.peak_gflops:,.0f} GFLOP/s in {self.precision}, measured on 2048 x 2048"),
            ("a step", f"{self.step_seconds:.3g} s, {speed} ({self.how})"),
            ("the run", format_duration(self.seconds)),
        ]
        if loss := self.details.get("predicted_loss"):
            words = "{loss:.3f} ({low:.3f} to {high:.3f}), by {ladder}".format(**loss)
            facts.append((f"predicted {loss['metric']}", words))
        return align_columns(facts) + [f"warning: {warning}" for warning in self.warnings]


HIDDEN = ("how", "step_work", "remedies", "details", "unit", "units_per_step")
COMPUTED = ("memory_total", "flops_per_step", "seconds", "utilization", "warnings")


def plan(workload: Workload, *, measure: bool = True, log: LogFn = lambda text: None) -> Plan:
    """The cost of a piece of work on this machine. measure: time real steps, unless they would not fit."""
    counted, memory, (parameters, trainable) = count_step(workload)
    machine = describe_machine(workload.device, workload.bf16)
    fits = sum(memory.values()) <= USABLE_MEMORY * machine["memory_available"]
    rate = EXPECTED_UTILIZATION * machine["peak_gflops"] * 1e9
    step, forward = counted.executed_flops * workload.micro_batches / rate, counted.forward_flops / rate
    how = f"predicted at {EXPECTED_UTILIZATION:.0%} of the matrix-product peak"
    if measured := measure and fits:
        log(f"timing {TIMED_STEPS} real steps of {parameters:,} parameters")
        objective = workload.make_objective(True).to(workload.device)
        objective.model.train()
        took = time_step(objective, workload.make_optimizer(objective.model), workload.batch, workload.bf16)
        step, forward = workload.micro_batches * took.micro_batch + took.update, took.forward
        how = f"{TIMED_STEPS} real steps timed"
    first = workload.forward_passes_first
    flops_per_step = counted.flops * workload.micro_batches * workload.world_size
    return Plan(
        model=workload.family, parameters=parameters, trainable=trainable,
        unit=workload.unit, units_per_step=workload.units_per_step, step_work=workload.step_work, steps=workload.steps,
        flops=float(flops_per_step * workload.steps + first * counted.forward_flops),
        first_flops=first * counted.forward_flops, first_seconds=first * forward,
        memory=memory, **estimate_checkpoint_bytes(parameters, counted.optimizer, workload.save_total_limit), **machine,
        measured=measured, how=how, step_seconds=step,
        world_size=workload.world_size, epochs=workload.epochs, remedies=workload.remedies,
    )  # fmt: skip


BYTES_PER_PARAMETER = 4
"""Of the master weights, which are in float32."""


def count_step(workload: Workload) -> tuple[StepProfile, dict[str, int], tuple[int, int]]:
    """The counted step, bytes by kind on one process, and how many parameters there are and are trained."""
    mode = FakeTensorMode()
    with mode:
        objective = workload.make_objective(False)
        objective.model.train()
    counted = profile_step(objective, workload.batch, workload.make_optimizer, bf16=workload.bf16, mode=mode)
    parameters = [parameter.numel() for parameter in objective.model.parameters()]
    trainable = [parameter.numel() for parameter in objective.model.parameters() if parameter.requires_grad]
    shares = workload.world_size if workload.strategy == "fsdp" else 1
    memory = {
        "weights": BYTES_PER_PARAMETER * sum(parameters) // shares,
        "gradients": counted.gradients // shares,
        "optimizer": counted.optimizer // shares,
        "activations": counted.activations,
        "temporaries": counted.temporaries,
    }
    if workload.world_size > shares:
        memory["gradient buckets"] = counted.gradients
    memory |= {name: module_bytes(model) for name, model in workload.frozen.items()}
    return counted, memory, (sum(parameters), sum(trainable))


def module_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def estimate_checkpoint_bytes(parameters: int, optimizer: int, save_total_limit: int) -> dict[str, Any]:
    """Bytes of a checkpoint, and of those that lie on disk at once while another is written."""
    saved = BYTES_PER_PARAMETER * parameters + optimizer
    return {"checkpoint_bytes": saved, "disk_bytes": saved * (save_total_limit + 1)}


def describe_machine(device: torch.device, bf16: bool) -> dict[str, Any]:
    """Memory that is free now, and the rate of matrix products."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    peak = peak_gflops(torch.bfloat16 if bf16 else torch.float32, device, torch.get_num_threads())
    return {"memory_available": free, "precision": "bf16" if bf16 else "fp32", "peak_gflops": peak}


@functools.cache
def peak_gflops(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """GFLOP/s of 2048 x 2048 products, measured once in a process (half a second to a second)."""
    return matmul_peak(2048, dtype, device)
