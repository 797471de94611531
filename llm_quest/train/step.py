"""One optimiser step's arithmetic: sums of losses and of gradients over micro-batches and processes, divided once.

      gradient = (sum of all gradients / sum of all counts) * min(1, clip / norm)

The division and the clipping are one factor and one pass over the gradients. Everything the host must know (loss,
count, norm, metrics, who was asked to stop) travels in one small tensor: one all-reduce, one read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm_quest.train.parallel import Parallel, accumulating, local


@dataclass(frozen=True)
class Numbers:
    """One step, over all micro-batches and processes. norm: of the mean gradient, before clipping. asked: how many
    processes were asked for each wish. loss is NaN if count is 0."""

    loss: float
    count: float
    tokens: int
    norm: float
    asked: tuple[bool, ...]
    metrics: Mapping[str, float]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16: matrix products in bfloat16, weights and sums in float32; fp32: nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def gradients(
    engine: nn.Module, batches: Sequence[Any], parallel: Parallel, precision: str
) -> tuple[dict[str, Tensor], int]:
    """Adds every micro-batch's gradients. Returns this process's sums, name -> (sum, count), and its tokens; the loss
    is the entry "". A tensor each, on the device: nothing is read yet."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    for number, batch in enumerate(batches):
        tokens += int(batch.num_tokens)
        with accumulating(engine, last=number == len(batches) - 1):
            with autocast(precision, parallel.device):
                loss = engine(batch.to(parallel.device))
            loss.total.backward()
        for name, (total, count) in {"": (loss.total, loss.count), **loss.metrics}.items():
            pair = torch.stack([total.detach().to(wide(parallel.device)), count.detach().to(wide(parallel.device))])
            sums[name] = sums[name] + pair if name in sums else pair
    if not batches and parallel.world > 1:
        raise ValueError(
            "with several processes each brings the same number of micro-batches: give one with nothing to learn"
        )
    return sums, tokens


def together(
    sums: Mapping[str, Tensor], tokens: int, asked: Sequence[bool], learned: Sequence[nn.Parameter], parallel: Parallel
) -> Numbers:
    """One all-reduce and one read. A gradient that every process holds in full is counted once, a sharded one by
    parts."""
    nothing = torch.zeros(2, dtype=wide(parallel.device), device=parallel.device)
    names = sorted(name for name in sums if name)
    own = nothing.new_tensor([tokens, *asked])
    squared = square_norm(learned, parallel).to(nothing).reshape(1)
    packed = torch.cat([sums.get("", nothing), squared, own, *(sums[name] for name in names)])
    total, count, square, all_tokens, *rest = parallel.sum_(packed).tolist()
    wishes, pairs = rest[: len(asked)], rest[len(asked) :]
    metrics = {name: pairs[2 * i] / pairs[2 * i + 1] if pairs[2 * i + 1] else math.nan for i, name in enumerate(names)}
    loss, norm = (total / count, math.sqrt(square) / abs(count)) if count else (math.nan, math.nan)
    return Numbers(loss, count, round(all_tokens), norm, tuple(wish > 0 for wish in wishes), metrics)


def square_norm(learned: Sequence[nn.Parameter], parallel: Parallel) -> Tensor:
    """This process's part of the squared norm of all summed gradients."""
    held = [p.grad for p in learned if p.grad is not None]
    sharded = any(isinstance(grad, DTensor) for grad in held)
    norm = torch.nn.utils.get_total_norm([local(grad) for grad in held]).to(parallel.device, wide(parallel.device))
    return norm**2 if sharded else norm**2 / parallel.world


def scale_(learned: Sequence[nn.Parameter], numbers: Numbers, clip: float | None) -> None:
    """From sums to the clipped mean, in place: one factor, one pass."""
    factor = 1 / numbers.count
    if clip is not None and numbers.norm > clip:
        factor *= clip / numbers.norm
    held = [local(p.grad) for p in learned if p.grad is not None]
    torch._foreach_mul_(held, factor)


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
