"""Cross-entropy of a linear head, in three forms: `full` (the definition), `chunked` (ours) and `fused_cross_entropy`
(PyTorch's).

The definition holds B x T x V logits in float32, their softmax and their gradient: at V = 128,256 they outweigh the
model. But the gradient of -log softmax(z)[t] is softmax(z) - onehot(t), known as soon as the logits are. So the chunked
form takes a few rows at a time, accumulates both gradients during the forward pass and frees their logits:

      z = x W^T          g = softmax(z) - onehot(t)          dx = g W          dW += g^T x

three matrix products, as many as the plain form, and never more than `rows` x V numbers. Capped logits c tanh(z/c)
multiply g by the slope 1 - tanh(z/c)^2. (`chunked_head_loss` does this for any loss of the logits: distillation is
another.)

Commonly got wrong: rows without a target have no gradient; capped logits need the slope of the cap; the sum is divided
by the number of targets of the whole step, not of a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.errors import UsageError
from llm_quest.layers import training_kernels
from llm_quest.layers.linear import autocast_dtype, disable_autocast, softcap_logits

CHUNK_ROWS = 256
MAX_FULL_LOGITS_BYTES = 64 * 2**20

CrossEntropyForm = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
LogitsLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""Logits of these rows, in float32 or wider -> the sum of their losses and, if needed, the gradient in the logits."""


def linear_cross_entropy(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    form: str = "auto",
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log softmax(x W^T)[target] over the rows whose target is not -100, in float32. form: a name in FORMS.
    softcap: the logits are cap * tanh(logits / cap)."""
    return CROSS_ENTROPY_FORMS[choose_form(x, weight, softcap) if form == "auto" else form](x, weight, targets, softcap)


def choose_form(x: Tensor, weight: Tensor, softcap: float | None = None) -> str:
    """The form for this size and device: full where the logits are small and no training kernel computes them; on CUDA
    PyTorch's own, which has no soft cap; else ours, because on a CPU the built-in one takes ten times as long
    (docs/benchmarks.md)."""
    if training_kernels.takes_training_kernel(x, weight):
        return "chunked"
    if x.shape[0] * weight.shape[0] * 4 <= MAX_FULL_LOGITS_BYTES:
        return "full"
    return "fused" if x.is_cuda and softcap is None and "linear_cross_entropy" in vars(F) else "chunked"


def full_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Cross-entropy from all logits: the definition."""
    logits = softcap_logits(F.linear(x, weight).float(), softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def fused_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """PyTorch's chunked form (torch 2.13 and later)."""
    if softcap is not None:
        raise UsageError("PyTorch's fused cross-entropy knows no cap on the logits: take the form 'chunked' or 'full'")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, targets, ignore_index=IGNORE_INDEX, reduction="sum", options=options)


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Chunked cross-entropy; it differs from the definition in rounding only."""
    by_kernel = training_kernels.takes_training_kernel(x, weight)
    return ChunkedCrossEntropy.apply(x, weight, targets, softcap, by_kernel)  # type: ignore[no-any-return, no-untyped-call]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes both gradients in the forward pass; backward multiplies them by the incoming scalar gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, by_kernel: bool) -> Tensor:
        def loss_and_grad(logits: Tensor, rows: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
            if by_kernel and needs_grad:
                return training_kernels.cross_entropy_by_kernel_(logits, targets[rows], IGNORE_INDEX).sum(), logits
            log_p, t = logits.log_softmax(dim=-1), targets[rows]
            loss = F.nll_loss(log_p, t, ignore_index=IGNORE_INDEX, reduction="sum")
            return loss, softmax_minus_onehot_(log_p, t) if needs_grad else None

        total, ctx.gradients = chunked_head_loss(x, weight, softcap, loss_and_grad, ctx.needs_input_grad[:2])
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        return *scale_saved_gradients(ctx, *upstream), None, None, None


def chunked_head_loss(
    x: Tensor, weight: Tensor, softcap: float | None, logits_loss: LogitsLoss, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The sum of a loss of the head's logits, computed for CHUNK_ROWS rows at a time, and its gradients in x and weight
    where they are needed. Sums are in float32 or wider."""
    dtype = autocast_dtype(x) or x.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    W = weight.to(dtype)
    dx = torch.empty_like(x) if needs_grad[0] else None
    dW = torch.zeros_like(weight, dtype=sum_dtype) if needs_grad[1] else None
    total = x.new_zeros((), dtype=sum_dtype)
    with disable_autocast(x):
        for first in range(0, x.shape[0], CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            x_rows = x[rows].to(dtype)
            logits = F.linear(x_rows, W).to(sum_dtype)
            capped = None if softcap is None else torch.tanh(logits / softcap)
            loss, g = logits_loss(
                logits if softcap is None or capped is None else softcap * capped, rows, any(needs_grad)
            )
            total += loss
            if g is not None:
                g = (g if capped is None else g * (1 - capped**2)).to(dtype)
                if dx is not None:
                    dx[rows] = g @ W
                if dW is not None:
                    add_product_(dW, g, x_rows)
    return total, (dx, dW)


def scale_saved_gradients(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `chunked_head_loss` times the incoming gradient."""
    assert ctx.gradients is not None, "the chunked form goes backward once: its gradients are scaled in place"
    (dx, dW), ctx.gradients = ctx.gradients, None
    dx = None if dx is None else dx.mul_(scale)
    return dx, None if dW is None else dW.mul_(scale).to(ctx.weight_dtype)


def softmax_minus_onehot_(log_p: Tensor, targets: Tensor) -> Tensor:
    """softmax - onehot, in place of the log-probabilities; zero in rows without a target."""
    is_target = targets != IGNORE_INDEX
    p = log_p.exp_()
    p[torch.arange(p.shape[0], device=p.device), targets.clamp(min=0)] -= 1
    return p.mul_(is_target[:, None])


def add_product_(dW: Tensor, g: Tensor, x: Tensor) -> None:
    """dW += g^T x, summed in float32 whatever the dtype of the factors."""
    if g.dtype == dW.dtype:
        dW.addmm_(g.T, x)
    else:
        dW.add_(g.T @ x)


CROSS_ENTROPY_FORMS: dict[str, CrossEntropyForm] = {
    "full": full_cross_entropy,
    "chunked": chunked_cross_entropy,
    "fused": fused_cross_entropy,
}
