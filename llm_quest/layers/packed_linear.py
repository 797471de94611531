"""Several projections of one input, stacked by rows: one matrix product instead of three."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.layers.linear import Linear


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
        return super().forward(x).split(list(self.parts.values()), dim=-1)

    def row_slice(self, name: str) -> slice:
        """The rows of one part."""
        start = 0
        for part, size in self.parts.items():
            if part == name:
                return slice(start, start + size)
            start += size
        raise ValueError(f"no part {name!r} here: it has {', '.join(self.parts)}")

    def packed_rows(self) -> dict[str, tuple[int, ...]]:
        return {"weight": tuple(self.parts.values())}


def row_splits(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters that are several matrices stacked by rows, and how many rows each has (Muon works on each alone)."""
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, HasPackedRows))
    return {f"{path}.{name}": rows for path, module in found for name, rows in module.packed_rows().items()}


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
