"""Steps of Muon by the operator in C++ (muon_step.cpp): momentum, iterations and weights of one matrix after the other,
each in the cache of one core, with half of every symmetric product.

What it computes is `newton_schulz_in_groups` (train/newton_schulz.py), in float32 or with numbers stored in bfloat16.

Commonly got wrong: X X^T, and every product of polynomials of it, is symmetric, so a product of two square matrices
does twice the work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quest.layers import native

SMALL_SIDE = 192
"""Below it three iterations on one Gram matrix in bfloat16 are less exact than the published ones: its rounding, which
they amplify, is not averaged over enough rows."""


@dataclass(frozen=True)
class MatrixUpdate:
    """One step of a weight, and of the matrices of the given sizes that lie in it one after the other. factors: of the
    orthogonal matrix that is subtracted, for each of them."""

    weight: Tensor
    momentum_buffer: Tensor
    gradient: Tensor
    sizes: Sequence[tuple[int, int]]
    factors: Sequence[float]
    momentum: float = 0.0
    decay: float = 1.0

    def fits(self) -> bool:
        """Whether the operator can read and write these tensors."""
        tensors = (self.weight, self.momentum_buffer, self.gradient)
        return all(type(t) in PLAIN and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


PLAIN = (Tensor, torch.nn.Parameter)
"""Neither a sharded tensor nor one without numbers."""


def iteration_groups(steps: int, dtype: torch.dtype, short_side: int) -> list[int]:
    """How many iterations are made on each Gram matrix: five in float32; 3 + 2 in bfloat16, or 2 + 2 + 1 where it is
    small."""
    most = steps_of_a_group(dtype, short_side)
    return [most] * (steps // most) + [steps % most] * (steps % most > 0)


def steps_of_a_group(dtype: torch.dtype, short_side: int) -> int:
    """The most iterations on one Gram matrix."""
    return 5 if dtype == torch.float32 else 3 if short_side >= SMALL_SIDE else 2


def missing_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Why the operator cannot be called; empty if it can."""
    if device.type != "cpu":
        return f"the kernel of Muon is for CPUs, and this is {device.type}"
    if dtype == torch.bfloat16 and not has_bfloat16_products():
        return "the processor has no avx512_bf16, or ATEN_CPU_CAPABILITY takes it away"
    return "" if native.is_loaded() else native.Library.reason


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the processor multiplies pairs of bfloat16 (AVX512)."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16")) and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def update_matrices(updates: Sequence[MatrixUpdate], steps: int, dtype: torch.dtype, isa: str = "best") -> None:
    """Update weights and momenta in place, on all threads. isa: of `native.ISA`."""
    torch.ops.llm_quest.muon_step(
        [one.weight for one in updates],
        [one.momentum_buffer for one in updates],
        [one.gradient for one in updates],
        [len(one.sizes) for one in updates],
        [side for one in updates for size in one.sizes for side in size],
        [factor for one in updates for factor in one.factors],
        [one.momentum for one in updates],
        [one.decay for one in updates],
        [steps_of_a_group(dtype, min(size)) for one in updates for size in one.sizes],
        steps,
        dtype == torch.bfloat16,
        native.ISA[isa],
    )


def orthogonalize_by_kernel(x: Tensor, steps: int, dtype: torch.dtype, isa: str = "best") -> Tensor:
    """Newton-Schulz iterations of each matrix x (..., rows, columns), as float32."""
    gradient = x.detach().to(torch.float32).contiguous()
    done = torch.zeros_like(gradient)
    count = gradient[..., 0, 0].numel()
    update = MatrixUpdate(
        done, torch.zeros_like(gradient), gradient, [(x.shape[-2], x.shape[-1])] * count, [-1.0] * count
    )
    update_matrices([update], steps, dtype, isa)
    return done
