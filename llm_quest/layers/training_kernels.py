"""Layers of a training step by operators in C++ (training_kernels.cpp): RMSNorm, SiLU(gate) up, rotary positions,
causal softmax and the cross-entropy of logits, each in one pass over its numbers, forward and backward.

They are taken in float32 on the host, in eager passes with gradients, and only where a run has asked for them
(`set_training_kernels`), since their last bits are not those of the plain forms. The plain form of each stands where
it is called; laws hold the two equal.

Commonly got wrong: compiled code fuses the plain forms itself; a pass under autocast has activations in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_quest.layers import native
from llm_quest.layers.linear import autocast_dtype
from llm_quest.layers.muon_kernel import PLAIN

BLOCK_QUERIES = 64
MAX_LENGTH = 512
"""Of the rows that `causal_attention_by_kernel` computes: it keeps all weights."""


class TrainingKernels:
    """Whether the operators are taken, for the whole process. isa: of `native.ISA`."""

    enabled = False
    isa = "best"


def set_training_kernels(enabled: bool) -> str:
    """Take the operators, or the plain forms. Returns why they cannot be had, empty if they can or are not wanted."""
    missing = native.Library.reason if enabled and not native.is_loaded() else ""
    TrainingKernels.enabled = enabled and not missing
    return missing


def takes_training_kernel(*tensors: Tensor) -> bool:
    """Whether the operators compute a layer with these inputs."""
    return (
        TrainingKernels.enabled
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(type(t) in PLAIN and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and autocast_dtype(tensors[0]) is None
    )


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as (N,D), without a copy where its rows lie at equal distances."""
    x = x if x.ndim == 2 else x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


class RMSNormKernel(torch.autograd.Function):
    """torch.rms_norm(x, (D,), weight, eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.isa = native.ISA[TrainingKernels.isa]
        rows = as_rows(x)
        y, inverse = torch.ops.llm_quest.rms_norm(rows, weight, eps, ctx.isa)
        ctx.save_for_backward(rows, weight, inverse)
        return y.view(x.shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        rows, weight, inverse = ctx.saved_tensors
        dx, dw = torch.ops.llm_quest.rms_norm_backward(as_rows(g.contiguous()), rows, weight, inverse, ctx.isa)
        return dx.view(g.shape), dw, None


class SiluProductKernel(torch.autograd.Function):
    """silu(gate) * up of gate_up (..., 2 F), gate first."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.isa = native.ISA[TrainingKernels.isa]
        rows = as_rows(gate_up)
        ctx.save_for_backward(rows)
        return torch.ops.llm_quest.silu_product(rows, ctx.isa).view(*gate_up.shape[:-1], -1)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        d = torch.ops.llm_quest.silu_product_backward(as_rows(g.contiguous()), rows, ctx.isa)
        return d.view(*g.shape[:-1], -1)  # type: ignore[no-any-return]


class RotateKernel(torch.autograd.Function):
    """`apply_rotary_emb(x, cos, sin)`; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.isa = native.ISA[TrainingKernels.isa]
        ctx.save_for_backward(cos, sin)
        return torch.ops.llm_quest.rotate(x, cos, sin, False, ctx.isa)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        g = g if g.stride(-1) == 1 else g.contiguous()
        return torch.ops.llm_quest.rotate(g, *ctx.saved_tensors, True, ctx.isa), None, None


class CausalAttentionKernel(torch.autograd.Function):
    """softmax(q k^T * scale) v of causal rows, BLOCK_QUERIES positions at a time with the keys that they see; the heads
    of a group are rows of one product. Keeps the weights for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.isa, ctx.scale, ctx.shapes = native.ISA[TrainingKernels.isa], scale, (q.shape, k.shape, v.shape)
        sharing = ctx.sharing = q.shape[2] // k.shape[2]
        q, k, v = (rows_of_groups(part, k.shape[2]) for part in (q, k, v))
        weights, out = [], q.new_empty(*q.shape[:2], v.shape[2])
        for first in range(0, k.shape[1], BLOCK_QUERIES):
            end = min(first + BLOCK_QUERIES, k.shape[1])
            block = slice(first * sharing, end * sharing)
            p = q[:, block] @ k[:, :end].mT
            torch.ops.llm_quest.causal_softmax_(p, first, sharing, scale, ctx.isa)
            torch.bmm(p, v[:, :end], out=out[:, block])
            weights.append(p)
        ctx.save_for_backward(q, k, v, *weights)
        return heads_of_groups(out, ctx.shapes[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, *weights = ctx.saved_tensors
        g = rows_of_groups(g, ctx.shapes[1][2])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for index, p in enumerate(weights):
            first, end = index * BLOCK_QUERIES, p.shape[2]
            block = slice(first * ctx.sharing, end * ctx.sharing)
            dv[:, :end].baddbmm_(p.mT, g[:, block])
            d = g[:, block] @ v[:, :end].mT
            torch.ops.llm_quest.causal_softmax_backward_(d, p, first, ctx.sharing, ctx.scale, ctx.isa)
            torch.bmm(d, k[:, :end], out=dq[:, block])
            dk[:, :end].baddbmm_(d.mT, q[:, block])
        d = (heads_of_groups(part, shape) for part, shape in zip((dq, dk, dv), ctx.shapes, strict=True))
        return *d, None


def rows_of_groups(x: Tensor, groups: int) -> Tensor:
    """x (B,T,H,d) as (B G, T r, d): the heads of a group are r rows for each position."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).reshape(x.shape[0] * groups, -1, x.shape[3])


def heads_of_groups(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The other way: (B G, T r, d) as (B,T,H,d)."""
    rows, length, heads = shape[:3]
    groups = x.shape[0] // rows
    return x.view(rows, groups, length, heads // groups, -1).transpose(1, 2).reshape(rows, length, heads, -1)


def rms_norm_by_kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.rms_norm over the last dimension, by the operator."""
    return RMSNormKernel.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def silu_product_by_kernel(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (..., 2 F), by the operator."""
    return SiluProductKernel.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]


def rotate_by_kernel(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_emb`, by the operator. cos, sin: from `widen_tables`, without gradients."""
    return RotateKernel.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


def causal_attention_by_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v of causal rows: q (B,T,H,d), k (B,T,G,d), v (B,T,G,dv) -> (B,T,H,dv)."""
    return CausalAttentionKernel.apply(q, k, v, scale)  # type: ignore[no-any-return, no-untyped-call]


def cross_entropy_by_kernel_(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Losses (N) of logits (N,V), which become the gradient of their sum, by the operator."""
    isa = native.ISA[TrainingKernels.isa]
    return torch.ops.llm_quest.cross_entropy_(logits, targets.contiguous(), ignore_index, isa)  # type: ignore[no-any-return]
