"""One micro-batch of a real run, counted and timed: what `quest plan` tells of recipes whose batches are not all alike.

FLOPs by PyTorch's counter over a forward and a backward pass, so that what is frozen costs no gradient; an attention
kernel's backward pass counts twice its forward pass. Activations: the bytes that the forward pass hands to autograd,
each storage once, parameters left out."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm_quest.cost.flops import flop_formulas
from llm_quest.cost.plan import TIMED_STEPS, step_optimizer, time_call
from llm_quest.layers.block import Block, SingleBlock


@dataclass(frozen=True)
class StepProfile:
    """Of one micro-batch. total_flops: forward and backward; forward_flops: alone. saved_bytes: bytes that the forward
    pass hands to autograd; largest_block_bytes: the most that one block hands to it."""

    total_flops: int
    forward_flops: int
    saved_bytes: int
    largest_block_bytes: int


def profile_step(objective: nn.Module, batch: Any, device: torch.device, bf16: bool) -> StepProfile:
    """Counted on the pass itself; no gradient stays."""
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, tuple[Any, int | None]] = {}
    inside: list[int] = []

    def record_storage(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.setdefault(storage.data_ptr(), (storage, inside[-1] if inside else None))
        return tensor

    blocks = [module for module in objective.modules() if isinstance(module, Block | SingleBlock)]
    marks = [block.register_forward_pre_hook(lambda *_, n=n: inside.append(n)) for n, block in enumerate(blocks)]
    marks += [block.register_forward_hook(lambda *_: inside.clear()) for block in blocks]
    hooks = torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor)
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    with counter, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        with hooks:
            loss = objective(batch)
        forward = counter.get_total_flops()
        loss.total.backward()
    for mark in marks:
        mark.remove()
    objective.zero_grad()
    sizes = [0] * max(1, len(blocks))
    for storage, block in kept.values():
        if block is not None:
            sizes[block] += storage.nbytes()
    whole = sum(storage.nbytes() for storage, _ in kept.values())
    return StepProfile(counter.get_total_flops(), forward, whole, max(sizes))


@dataclass(frozen=True)
class StepSeconds:
    """Of a micro-batch, forward and backward, and of an update; medians of three after one to warm up."""

    micro_batch: float
    update: float

    def total(self, micro_batches: float) -> float:
        """A step of so many such micro-batches."""
        return micro_batches * self.micro_batch + self.update


def time_step(
    objective: Any, optimizer: torch.optim.Optimizer, batch: Any, device: torch.device, bf16: bool
) -> StepSeconds:
    def backward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = objective(batch)
        (loss.total / loss.count).backward()

    micro, update = [], []
    for _ in range(1 + TIMED_STEPS):
        micro.append(time_call(backward, device))
        update.append(time_call(lambda: step_optimizer(objective.model, optimizer), device))
    return StepSeconds(statistics.median(micro[1:]), statistics.median(update[1:]))
