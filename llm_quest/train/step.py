"""The arithmetic of an optimizer step: sums of losses and of gradients over micro-batches and processes, divided
once.

          gradient = (sum of all gradients / sum of all counts) * min(1, max_grad_norm / norm)

The division and the clipping are one factor and one pass over the gradients. Everything that the host needs (loss,
count, norm, metrics, requests to stop) is in one small tensor: one all-reduce, one copy to the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llm_quest.errors import ResourceError
from llm_quest.train.parallel import (
    DistributedContext,
    gradient_accumulation,
    is_fsdp_module,
    is_sharded,
    local_tensor,
)

OUT_OF_MEMORY_REMEDY = (
    "lower the micro-batch and raise accumulation, switch activation checkpointing on, or shorten the sequences"
)


@dataclass(frozen=True)
class StepStats:
    """Numbers of one step, over all micro-batches and processes. grad_norm: of the mean gradient, before clipping.
    parameter_norm: of what is trained, before the update. requests: whether any process asked for each of them. loss is
    NaN if count is 0."""

    loss: float
    count: float
    tokens: int
    grad_norm: float
    parameter_norm: float
    requests: tuple[bool, ...]
    metrics: Mapping[str, float]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16: matrix products in bfloat16, weights and sums in float32; fp32: nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def accumulate_gradients(
    engine: nn.Module,
    batches: Sequence[Any],
    parallel: DistributedContext,
    precision: str,
) -> tuple[dict[str, Tensor], int]:
    """Add every micro-batch's gradients. Returns this process's sums, name -> (sum, count), and its tokens; the loss
    is the entry "". The sums stay on the device: nothing is read yet."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    for number, batch in enumerate(batches):
        tokens += int(batch.num_tokens)
        with gradient_accumulation(engine, sync_gradients=number == len(batches) - 1):
            with autocast(precision, parallel.device):
                loss = engine(batch.to(parallel.device))
            loss.total.backward()
        for name, (total, count) in {"": (loss.total, loss.count), **loss.metrics}.items():
            pair = torch.stack(
                [total.detach().to(sum_dtype(parallel.device)), count.detach().to(sum_dtype(parallel.device))]
            )
            sums[name] = sums[name] + pair if name in sums else pair
    if not batches and parallel.world_size > 1:
        raise ValueError(
            "with several processes each brings the same number of micro-batches: give one with nothing to learn"
        )
    return sums, tokens


def interrupt_backward(parameters: Sequence[nn.Parameter]) -> list[RemovableHandle]:
    """Let signal handlers run during a backward pass, at each gradient that is ready: Python runs them only between its
    own instructions, and a backward pass has none."""
    return [p.register_post_accumulate_grad_hook(lambda p: None) for p in parameters]


def reduce_step_stats(
    sums: Mapping[str, Tensor],
    tokens: int,
    requests: Sequence[bool],
    parameters: Sequence[nn.Parameter],
    parallel: DistributedContext,
) -> StepStats:
    """Reduce the sums of a step over all processes, with one all-reduce and one copy to the host. A gradient that every
    process holds in full is counted once, a sharded one by parts. A metric that no batch counted anything for is left
    out."""
    nothing = torch.zeros(2, dtype=sum_dtype(parallel.device), device=parallel.device)
    names = sorted(name for name in sums if name)
    own = nothing.new_tensor([tokens, *requests])
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([norm_squared(tensors, parallel) for tensors in (grads, parameters)]).to(nothing)
    packed = torch.cat([sums.get("", nothing), squares, own, *(sums[name] for name in names)])
    total, count, square, weights_square, all_tokens, *rest = parallel.all_reduce_(packed).tolist()
    requested, pairs = rest[: len(requests)], rest[len(requests) :]
    means = zip(names, pairs[::2], pairs[1::2], strict=True)
    metrics = {name: total_of / count_of for name, total_of, count_of in means if count_of}
    loss, norm = (total / count, math.sqrt(square) / abs(count)) if count else (math.nan, math.nan)
    asked = tuple(one > 0 for one in requested)
    return StepStats(loss, count, round(all_tokens), norm, math.sqrt(weights_square), asked, metrics)


@torch.no_grad()
def norm_squared(tensors: Sequence[Tensor], parallel: DistributedContext) -> Tensor:
    """This process's part of the squared norm of all gradients, or of all parameters."""
    sharded = [local_tensor(tensor) for tensor in tensors if is_sharded(tensor)]
    whole = [tensor for tensor in tensors if not is_sharded(tensor)]
    parts, all_of_it = (
        torch.nn.utils.get_total_norm(gradients).to(parallel.device, sum_dtype(parallel.device))
        for gradients in (sharded, whole)
    )
    return parts**2 + all_of_it**2 / parallel.world_size


def scale_gradients_(parameters: Sequence[nn.Parameter], stats: StepStats, max_grad_norm: float | None) -> None:
    """Scale summed gradients to the clipped mean, in place: one factor, one pass."""
    factor = 1 / stats.count
    if max_grad_norm is not None and stats.grad_norm > max_grad_norm:
        factor *= max_grad_norm / stats.grad_norm
    gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def compile_objective(objective: nn.Module) -> nn.Module:
    """torch.compile in place, so that no name changes; under FSDP2 block by block, because its hooks are between
    them."""
    blocks = [module for module in objective.modules() if module is not objective and is_fsdp_module(module)]
    for module in blocks or (objective,):
        module.compile()  # type: ignore[union-attr]
    return objective


def raise_if_out_of_memory(error: RuntimeError, number: int) -> None:
    """ResourceError in place of torch's error, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        raise ResourceError(
            f"out of memory in step {number + 1}: {OUT_OF_MEMORY_REMEDY} ({str(error).splitlines()[0]})"
        ) from error
