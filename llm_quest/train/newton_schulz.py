"""Muon's orthogonalization in six forms of the same polynomial.

Newton-Schulz, on X / |X| (Jordan et al. 2024; the square matrix is the smaller one, n x n):

      X <- a X + (b X X^T + c (X X^T)^2) X        five times

Every step multiplies each singular value s by p(s^2) = a + b s^2 + c s^4 and leaves the directions as they are. So the
five steps together are Q X with Q = V f(L) V^T, where X X^T = V L V^T and f is the product of the five p's: the
eigenvalue form. For X (n,m) the steps are 10 n^2 (2 m + n) FLOPs of products, the eigenvalue form 2 n^2 (2 m + n) and
one decomposition, which takes as long as about 7 to 23 products of n x n, according to the processor.

The Gram form iterates on G = X X^T and the product Q of the five P = p(G), which commute:

      Q <- P Q        G <- P G P        and at the end Q X

2 n^2 (2 m + 17 n) FLOPs, fewer than on X if m > 1.5 n; a matrix that is nearer to a square is iterated on itself.

Commonly got wrong: iterating on X X^T is cheaper than on X, but in bfloat16 it loses every singular value below
sqrt(2^-8) of the largest; these two forms are computed in float32 or wider.

The kernel in C++ (`layers/muon_kernel.py`) iterates on G too, and computes half of each symmetric product. In
bfloat16 it makes three steps on one G, then two on that of the new X, and stores every matrix less its scalar part
(G - mu 1): so it is as exact as the steps on X, with 2 n^2 (3 m + 7 n) FLOPs in place of 10 n^2 (2 m + n). Of less than
192 rows it makes two, two and one.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llm_quest.errors import QuestWarning
from llm_quest.layers.muon_kernel import iteration_groups, missing_kernel, orthogonalize_by_kernel
from llm_quest.machine.hardware import bf16_support

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7
MAX_ITERATED_SIDE = 64
"""Of a matrix: up to here a decomposition takes two to three times as long as all five steps on X."""
GRAM_RATIO = 1.5
"""Of the long side to the short one: up to here the Gram form has more FLOPs than the steps on X."""


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iterations (5 above) of each matrix x (..., rows, columns), in its dtype and shape."""
    a, b, c = COEFFICIENTS
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        p = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, *((x, p) if tall else (p, x)), beta=a)
    return x


def newton_schulz_by_eigenvalues(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iterations of x (..., rows, columns) by the eigenvalues of X X^T (X^T X of a tall matrix), in
    float32 or wider."""
    a, b, c = COEFFICIENTS
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tall = x.shape[-2] > x.shape[-1]
    gram = x.mT @ x if tall else x @ x.mT
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp(min=SMALLEST_NORM)  # the trace is |X|^2
    values, vectors = torch.linalg.eigh(gram / norm[..., None, None] ** 2)
    factor = torch.ones_like(values)
    for _ in range(steps):
        p = a + b * values + c * values**2
        values, factor = values * p**2, factor * p
    q = (vectors * (factor / norm[..., None])[..., None, :]) @ vectors.mT
    return x @ q if tall else q @ x


def newton_schulz_by_eigenvalues_if_large(x: Tensor, steps: int) -> Tensor:
    """`newton_schulz_by_eigenvalues`; of a matrix with few rows or columns the steps on X, in the same dtype."""
    if min(x.shape[-2:]) > MAX_ITERATED_SIDE:
        return newton_schulz_by_eigenvalues(x, steps)
    return newton_schulz(x.to(torch.promote_types(x.dtype, torch.float32)), steps)


def newton_schulz_by_gram(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iterations of x (..., rows, columns) by products of X X^T (X^T X of a tall matrix), in float32 or
    wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tall, (short, long) = x.shape[-2] > x.shape[-1], sorted(x.shape[-2:])
    if long <= GRAM_RATIO * short:
        return newton_schulz(x, steps)
    a, b, c = COEFFICIENTS
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    gram = x.mT @ x if tall else x @ x.mT
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp(min=SMALLEST_NORM)  # the trace is |X|^2
    gram = gram / norm[..., None, None] ** 2
    q = torch.eye(short, dtype=x.dtype, device=x.device) / norm[..., None, None]
    for step in range(steps):
        p = multiply_add(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        q = p * q.diagonal(dim1=-2, dim2=-1)[..., None] if step == 0 else p @ q
        if step < steps - 1:
            gram = (p @ gram) @ p
    return x @ q if tall else q @ x


def newton_schulz_in_groups(x: Tensor, groups: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Newton-Schulz iterations of x (..., rows, columns), so many of each group on one Gram matrix, whose numbers are
    rounded to dtype where the kernel stores them. A matrix M + m 1 is kept as M and the number m."""
    a, b, c = COEFFICIENTS
    tall, short = x.shape[-2] > x.shape[-1], min(x.shape[-2:])
    stored = functools.partial(round_to, dtype=dtype)
    x = x.to(torch.float32)
    scale = 1 / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    x, mean = stored(x.mT if tall else x), torch.full_like(scale, 1 / short)
    for index, steps in enumerate(groups):
        if index:
            scale, mean = torch.ones_like(scale), x.square().sum((-2, -1), keepdim=True) / short
        gram = stored(scale**2 * (x @ x.mT) - mean * torch.eye(short, device=x.device))
        q = q_part = torch.zeros_like(mean)
        for step in range(steps):
            p, part = stored((b + 2 * c * mean) * gram + c * (gram @ gram)), a + b * mean + c * mean**2
            q, q_part = (stored(part * q + q_part * p + q @ p), q_part * part) if step else (p, part)
            if step < steps - 1:
                turned = stored(part * gram + mean * p + gram @ p)
                gram = stored(part * turned + part * mean * p + turned @ p)
                mean = mean * part**2
        x = scale * (q_part * x + q @ x)
        x = x if index == len(groups) - 1 else stored(x)
    return x.mT if tall else x


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers that dtype can hold."""
    return x.to(dtype).to(torch.float32)


def newton_schulz_by_kernel(x: Tensor, steps: int, *, dtype: torch.dtype) -> Tensor:
    """The iterations in groups by the operator in C++, or by their definition, with a warning, where it cannot be
    had."""
    if reason := missing_kernel(x.device, dtype):
        warn_of_definition(reason)
        return newton_schulz_in_groups(x, iteration_groups(steps, dtype, min(x.shape[-2:])), dtype)
    return orthogonalize_by_kernel(x, steps, dtype)


@functools.cache
def warn_of_definition(reason: str) -> None:
    warnings.warn(f"Muon's kernel cannot be had, and its plain form is slow: {reason}", QuestWarning, stacklevel=2)


def newton_schulz_bf16(x: Tensor, steps: int) -> Tensor:
    return newton_schulz(x.to(torch.bfloat16), steps)


def newton_schulz_fp32(x: Tensor, steps: int) -> Tensor:
    return newton_schulz(x.to(torch.float32), steps)


KERNEL_FORMS = {"kernel_float32": torch.float32, "kernel_bfloat16": torch.bfloat16}
MUON_FORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "bfloat16": newton_schulz_bf16,
    "float32": newton_schulz_fp32,
    "eigenvalues": newton_schulz_by_eigenvalues_if_large,
    "gram": newton_schulz_by_gram,
    **{form: functools.partial(newton_schulz_by_kernel, dtype=dtype) for form, dtype in KERNEL_FORMS.items()},
}
"""Form -> the orthogonalization of matrices in so many steps. Two of them may differ by 2.5e-2."""


def update_scale(rows: int, columns: int) -> float:
    """The factor of an orthogonal matrix with which its root mean square is that of an AdamW update, about 0.2."""
    return 0.2 * math.sqrt(max(rows, columns))


@functools.cache
def default_form(device: torch.device) -> str:
    """bfloat16, as published, where the hardware multiplies it, float32 elsewhere. Commonly got wrong: on a CPU without
    bfloat16 instructions a product in bfloat16 takes up to 200 times as long as one in float32."""
    return "bfloat16" if bf16_support(device)[0] else "float32"


def orthogonalize(gradient: Tensor, rows: Sequence[int] | None = None, steps: int = 5, form: str = "") -> Tensor:
    """Orthogonalize a gradient (..., rows, columns): 0.2 sqrt(max(rows, columns)) times about U V^T, for each of the
    matrices that are stacked in it by these numbers of rows (None: one matrix). form: of `MUON_FORMS`; empty:
    `default_form`. Neighbors of one size (keys and values, gate and up) are one batch."""
    one_form = MUON_FORMS[form or default_form(gradient.device)]
    runs = [(size, len(list(run))) for size, run in itertools.groupby(rows or gradient.shape[-2:-1])]
    done = []
    for (size, count), part in zip(runs, gradient.split([size * count for size, count in runs], -2), strict=True):
        stack = part if part.ndim == 2 and count == 1 else part.unflatten(-2, (count, size)).flatten(0, -3)
        update = one_form(stack, steps).mul_(update_scale(size, part.shape[-1]))
        done.append(update.reshape(part.shape).to(gradient.dtype))
    return done[0] if len(done) == 1 else torch.cat(done, -2)
