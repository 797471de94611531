"""Feed-forward layers: they act on each token alone.

Commonly got wrong: the activation is on the gate, not on the other projection; GPT-2's GELU is the tanh approximation
and differs from the exact one in the fourth digit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers import training_kernels
from llm_quest.layers.linear import Linear, PackedLinear
from llm_quest.scope import Scope


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): the GELU of GPT-2 and Gemma (Hendrycks & Gimpel,
    arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the GELU of CLIP, a coarser approximation (same paper, section 2)."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """down(activation(up(x))): the feed-forward layer of the original transformer (arXiv:1706.03762, eq. 2)."""

    def __init__(self, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor], *, bias: bool):
        super().__init__()
        self.activation = activation
        self.up = Linear(dim, hidden_dim, bias=bias)
        self.down = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202): SwiGLU with SiLU, GeGLU with GELU."""

    def __init__(self, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor], *, bias: bool = False):
        super().__init__()
        self.activation = activation
        self.gate_up = PackedLinear(dim, gate=hidden_dim, up=hidden_dim, bias=bias)
        self.down = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        if (
            self.activation is F.silu
            and type(self.gate_up) is PackedLinear
            and training_kernels.takes_training_kernel(x)
        ):
            return self.down(training_kernels.silu_product_by_kernel(self.gate_up.forward_fused(x)))
        gate, up = self.gate_up(x)
        return self.down(self.activation(gate) * up)
