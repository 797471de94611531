"""Projectors: from an image encoder's vectors to a language model's."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class LinearProjector(nn.Module):
    """out(x): one matrix (LLaVA's first version, Liu et al. 2023, arXiv:2304.08485)."""

    def __init__(self, dim: int, out_dim: int, *, bias: bool = True):
        super().__init__()
        self.out = nn.Linear(dim, out_dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch W"]:
        return self.out(x)


class MLPProjector(nn.Module):
    """out(GELU(up(x))), the hidden layer as wide as the output (LLaVA-1.5, Liu et al. 2024, arXiv:2310.03744). GELU by
    erf."""

    def __init__(self, dim: int, out_dim: int, *, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(dim, out_dim, bias=bias)
        self.out = nn.Linear(out_dim, out_dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch W"]:
        return self.out(F.gelu(self.up(x)))
