"""Log-probabilities of given tokens, in two forms: `plain` (the definition) and `chunked` (no more than a few rows of
logits at a time, on the way back too). DPO, the policy-gradient family and evaluation all read these.

      z = x W^T / temperature      log p = z[target] - logsumexp(z)      d log p / dz = onehot(target) - softmax(z)

Commonly got wrong: (1) samples drawn at a temperature are scored at 1, and the ratio of a policy with itself is not 1;
(2) an off-by-one shift: here `targets[b, t]` is predicted *at* t, as everywhere in the house; (3) log-softmax in
bfloat16. Only the product with the head is in the model's dtype, as when sampling; all after it is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.objectives.cross_entropy import ROWS, add_product_
from llm_quest.objectives.next_token import hidden_of

Form = Callable[[Tensor, Tensor, Tensor, float | None, float], Tensor]
SMALL = 4 * 2**20
"""Bytes of logits that a processor keeps at hand. Beyond, making them again in parts is quicker than fetching them:
4,096 rows at V 4096 took 0.31 s in parts against 0.43 (float32), 0.13 against 0.32 (bfloat16, docs/LOG.md)."""


def token_log_probs(model: Any, batch: TokenBatch, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """log p(targets[b, t] | what stands up to t), float32; exactly 0 where the target is -100, for which no logits are
    made. Dropout is as the model's mode says."""
    return log_probs_of(model, hidden_of(model, batch), batch.targets, temperature)


def log_probs_of(
    model: Any, h: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"], temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """The same from hidden states that are there already."""
    learned = targets != IGNORE
    x, head = h[learned], model.head
    form = plain if x.shape[0] * head.weight.shape[0] * 4 <= SMALL else chunked
    found = form(x, head.weight, targets[learned], head.cap, temperature)
    return found.new_zeros(targets.shape).masked_scatter(learned, found)


def plain(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    cap: float | None,
    temperature: float,
) -> Float[Tensor, " N"]:
    """The definition."""
    z = widened(F.linear(x, weight))
    z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature
    return z.gather(1, targets[:, None]).squeeze(1) - z.logsumexp(dim=1)


def chunked(x: Tensor, weight: Tensor, targets: Tensor, cap: float | None, temperature: float) -> Tensor:
    """The same but for rounding; the logits are made again on the way back."""
    return Chunked.apply(x, weight, targets, cap, temperature)  # type: ignore[no-any-return, no-untyped-call]


class Chunked(torch.autograd.Function):
    """ROWS rows at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float | None, temperature: float) -> Tensor:
        kind, on = x.device.type, torch.is_autocast_enabled(x.device.type)
        ctx.dtype = torch.get_autocast_dtype(kind) if on else x.dtype
        ctx.cap, ctx.temperature = cap, temperature
        ctx.save_for_backward(x, weight, targets)
        W = weight.to(ctx.dtype)
        with torch.autocast(kind, enabled=False):
            parts = [
                plain(some.to(ctx.dtype), W, t, cap, temperature)
                for some, t in zip(x.split(ROWS), targets.split(ROWS), strict=True)
            ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, targets = ctx.saved_tensors
        W = weight.to(ctx.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=upstream[0].dtype) if ctx.needs_input_grad[1] else None
        for first in range(0, x.shape[0], ROWS):
            rows = slice(first, first + ROWS)
            some = x[rows].to(ctx.dtype)
            g = slope(some, W, targets[rows], ctx.cap, ctx.temperature).mul_(upstream[0][rows, None]).to(ctx.dtype)
            if dx is not None:
                dx[rows] = g @ W
            if dW is not None:
                add_product_(dW, g, some)
        return dx, None if dW is None else dW.to(weight.dtype), None, None, None


def slope(x: Tensor, weight: Tensor, targets: Tensor, cap: float | None, temperature: float) -> Tensor:
    """d log p / d(x W^T), (N,V)."""
    z = widened(F.linear(x, weight))
    bent = None if cap is None else torch.tanh(z / cap)
    z = (z if cap is None or bent is None else cap * bent) / temperature
    g = z.softmax(dim=1).neg_()
    g[torch.arange(len(targets), device=g.device), targets] += 1
    g /= temperature
    return g if bent is None else g * (1 - bent**2)


def widened(z: Tensor) -> Tensor:
    """At least float32."""
    return z if z.dtype == torch.float64 else z.float()
