"""One matrix product for many experts: rows sorted by expert, each run of rows times its expert's matrix.

PyTorch's `grouped_mm` does the work. It is wrapped as an operator of ours because its shape rule for compiled code
knows bfloat16 only, while the kernel itself takes float32 too; so that eager and compiled code run the same kernel,
forward and backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("llm_quest::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (N,I), weight (E,I,O), ends (E,) int32: rows ends[e-1]..ends[e] of x belong to expert e -> (N,O)."""
    return F.grouped_mm(x, weight, offs=ends)


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("llm_quest::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """For each expert the product of its rows, x_e^T y_e: (N,I), (N,O) -> (E,I,O). An expert without rows gets
    zeros."""
    return F.grouped_mm(x.transpose(0, 1), y, offs=ends)


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    dx = grouped_product(gradient, weight.transpose(1, 2), ends)
    return dx, grouped_outer(x.contiguous(), gradient, ends), None


grouped_product.register_autograd(backward, setup_context=remember)
