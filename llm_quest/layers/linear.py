"""Projections: `Linear`, several of one input as one matrix product (`PackedLinear`), and the output projection
(`LMHead`).

y = x W^T + b, and the same in the other order for few rows: (W x^T)^T. The product is the same, but the host's matrix
multiplication is tuned for many rows of x. For the few rows of a decode step the other order is 1.2 to 1.5 times as
fast, and needs no second copy of the weights. Measured on one core (`docs/LOG.md`, 2026-11-24), milliseconds for
(50257, 768) and (3072, 768): bfloat16, 1 row 8.8 and 0.28 against 6.3 and 0.23, 32 rows 11.0 and 0.36 against 7.7 and
0.24; float32, 32 rows 33 and 1.17 against 27 and 0.86, while below 8 rows it is slower. So it is from 64 rows on (the
matrices of an 11M model one after another, on another machine: 15.4 ms against 12.5).

A third form is a loop of our own in C++ (quantized_rows.cpp) that reads W once, in order, and sums in float32: where
the host's product reads memory at half of its rate, or has no instructions for bfloat16.

Commonly got wrong: a tied head is the embedding itself, not a copy of it; the order for few rows is for passes without
gradients alone; a float32 bias does not set the dtype of a product under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers import native

FEW_ROWS = {torch.bfloat16: range(1, 65), torch.float32: range(8, 49)}
"""The numbers of rows that are few, by dtype; the values here are of one machine (`set_few_row_products`)."""
KERNEL_ROWS: dict[torch.dtype, range] = {}
"""The same for the loop in C++, which is taken before the other order; none until they are set."""
NO_ROWS = range(0)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives the products of this tensor; None without autocast, as on the meta device."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def disable_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast for tensors on the device of this one."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def set_few_row_products(rows: Mapping[str, tuple[int, int]], kernel: Mapping[str, tuple[int, int]]) -> str:
    """Set, for the whole process, for which numbers of rows `Linear` takes the other order, and for which the loop in
    C++: dtype -> the first number and the first that is too many. A dtype that is missing takes the plain order.
    Returns why the loop cannot be had, empty if it can or is not wanted."""
    missing = native.Library.reason if kernel and not native.is_loaded() else ""
    for table, ranges in ((FEW_ROWS, rows), (KERNEL_ROWS, {} if missing else kernel)):
        table.clear()
        table.update({getattr(torch, dtype): range(first, end) for dtype, (first, end) in ranges.items()})
    return missing


class Linear(nn.Linear):
    """nn.Linear that takes the fastest form for few rows where no gradient is needed."""

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        weight = self.weight
        return fastest_product(x, weight)(x, weight, self.bias)


def fastest_product(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The form of x W^T + b for so many rows. Under autocast the dtypes here are not those of the product, and the
    other order would return columns for which the next layer copies its weights."""
    if torch.is_grad_enabled():
        return F.linear
    rows, dtype = x.shape[:-1].numel(), x.dtype
    by_kernel = rows in KERNEL_ROWS.get(dtype, NO_ROWS) and weight.device.type == "cpu"
    few = rows in FEW_ROWS.get(dtype, NO_ROWS)
    if not (by_kernel or few) or dtype != weight.dtype or not weight.is_contiguous():
        return F.linear
    if autocast_dtype(x):
        return F.linear
    if by_kernel and not torch.compiler.is_exporting():  # an exported program does not depend on the library
        return linear_by_kernel
    return linear_few_rows if few else F.linear


def linear_by_kernel(
    x: Float[Tensor, "*batch I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*batch O"]:
    """F.linear by the operator in C++: sums in float32, each in an order that does not depend on the other rows."""
    y = torch.ops.llm_quest.float_rows(x.to(torch.float32).contiguous(), weight, native.ISA["best"])
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def linear_few_rows(
    x: Float[Tensor, "*batch I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*batch O"]:
    """F.linear in the other order. A single row is taken twice: with one column the product falls back to the slow
    order."""
    rows = x.reshape(-1, x.shape[-1])
    columns = rows.expand(2, -1).T if rows.shape[0] == 1 else rows.T
    y = (weight @ columns)[:, : rows.shape[0]].T.contiguous()  # what follows is slow on rows that lie as columns
    return (y if bias is None else y + bias.to(y.dtype)).reshape(*x.shape[:-1], -1)


class LMHead(Linear):
    """logits = x W^T, without bias; with a soft cap, cap * tanh(logits / cap). If tied, W is the token embedding
    itself: one parameter with two uses."""

    def __init__(
        self, dim: int, vocab_size: int, *, tied_embedding: nn.Embedding | None = None, softcap: float | None = None
    ):
        super().__init__(dim, vocab_size, bias=False, device="meta" if tied_embedding is not None else None)
        if tied_embedding is not None:
            self.weight = tied_embedding.weight
        self.softcap = softcap

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        logits = super().forward(x)
        return softcap_logits(logits, self.softcap)


def softcap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap): bounded by the cap (Gemma 2); None caps nothing."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@runtime_checkable
class HasPackedRows(Protocol):
    """A layer whose parameters are several matrices stacked by rows."""

    def packed_rows(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> the number of rows of each of its matrices. A leading dimension (experts) does not count as
        rows."""


class PackedLinear(Linear):
    """`PackedLinear(D, q=.., k=.., v=..)(x)` is the tuple (q, k, v). The rows of `weight` are the parts in that order.

    `parts` names the rows, for weight maps, LoRA targets, Muon and QK-Clip."""

    def __init__(self, dim: int, *, bias: bool = False, **parts: int):
        super().__init__(dim, sum(parts.values()), bias=bias)
        self.parts = parts

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x).split_with_sizes(list(self.parts.values()), dim=-1)  # type: ignore[no-any-return]

    def forward_fused(self, x: Tensor) -> Tensor:
        """The outputs of all parts side by side, as one tensor. Forward hooks are not called."""
        return super().forward(x)

    def row_slice(self, name: str) -> slice:
        """The rows of one part."""
        return find_row_slice(self.parts, name)

    def packed_rows(self) -> dict[str, tuple[int, ...]]:
        return {"weight": tuple(self.parts.values())}


def find_row_slice(parts: Mapping[str, int], name: str) -> slice:
    """The rows of one of these parts, which are stacked in this order."""
    start = 0
    for part, size in parts.items():
        if part == name:
            return slice(start, start + size)
        start += size
    raise ValueError(f"no part {name!r} here: it has {', '.join(parts)}")


def row_splits(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters that are several matrices stacked by rows, and how many rows each has (Muon works on each alone)."""
    packed_modules = ((path, module) for path, module in model.named_modules() if isinstance(module, HasPackedRows))
    return {f"{path}.{name}": rows for path, module in packed_modules for name, rows in module.packed_rows().items()}


@torch.no_grad()
def scale_rows_(weight: Tensor, factor: Float[Tensor, " rows"]) -> None:
    """Multiply each row of a matrix (or entry of a bias) by its factor, in place, sharded or not. A factor of 1 leaves
    its row bit by bit."""
    from torch.distributed.tensor import DTensor, Replicate  # a second to import, which every load would pay

    factor = factor.to(device=weight.device, dtype=weight.dtype).view(-1, *[1] * (weight.dim() - 1))
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        factor = DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    weight.mul_(factor)


def require_unwrapped(*projections: nn.Module) -> None:
    """Raise ValueError if one of them is wrapped: its rows are then not all that makes its output."""
    for projection in projections:
        if not isinstance(projection, nn.Linear):
            raise ValueError(
                f"rescaling acts on a projection's own weights, and {type(projection).__name__} replaces it here: "
                "merge the adapter first, or leave the rescaling out"
            )
