"""The experts of a sparse mixture: E feed-forward layers as two stacks of matrices; every token runs through K of them.

They run in one of two forms. `run_experts_for_loop` is the definition: for each expert, its tokens.
`run_experts_grouped_mm` sorts the tokens by expert and multiplies each run of rows by its expert's matrix in one call.
A law holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.grouped_mm import ExpertPermutation, GroupedLinear
from llm_quest.layers.linear import autocast_dtype


class ExpertBiases(NamedTuple):
    """The biases of an expert's two matrices."""

    gate_up: Float[Tensor, "E F2"]
    down: Float[Tensor, "E D"]


class ExpertsFunction(Protocol):
    """Runs experts: x (N,D), gate_up (E,2F,D), down (E,D,F), topk_ids (N,K), topk_weights (N,K) -> (N,D)."""

    def __call__(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_activation: Callable[[Tensor], Tensor],
        biases: ExpertBiases | None = None,
    ) -> Tensor: ...


ExpertActivation = Callable[[Tensor], Tensor]


def glu_activation(activation: Callable[[Tensor], Tensor]) -> ExpertActivation:
    """The function between an expert's two matrices: (..., 2F) -> activation(gate) * up (..., F)."""

    def inner(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return activation(gate) * up

    return inner


def clamped_swiglu(alpha: float, limit: float) -> ExpertActivation:
    """gpt-oss's function between an expert's two matrices: (up + 1) * gate * sigmoid(alpha gate), with the gate at most
    `limit` and up within +-limit. Commonly got wrong: the gate has no lower limit."""

    def inner(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)

    return inner


def relu_squared(h: Tensor) -> Tensor:
    """max(h, 0)^2, without a gate (So et al. 2021, arXiv:2109.08668): Nemotron's experts."""
    return F.relu(h).square()


def run_experts_for_loop(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    topk_ids: Int[Tensor, "N K"],
    topk_weights: Float[Tensor, "N K"],
    expert_activation: ExpertActivation,
    biases: ExpertBiases | None = None,
) -> Float[Tensor, "N D"]:
    """The definition: each expert runs on its tokens. (unbind, not an index: the backward pass of `weight[e]` would
    build a gradient of the full size for every expert.)"""
    out = torch.zeros_like(x)
    b_in, b_out = [[None] * len(down)] * 2 if biases is None else [part.to(x.dtype).unbind() for part in biases]
    for expert, (w_in, w_out) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = torch.where(topk_ids == expert)
        y = F.linear(expert_activation(F.linear(x[token], w_in, b_in[expert])), w_out, b_out[expert])
        out = out.index_add(0, token, (y * topk_weights[token, slot, None].to(y.dtype)).to(out.dtype))
    return out


def run_experts_grouped_mm(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    topk_ids: Int[Tensor, "N K"],
    topk_weights: Float[Tensor, "N K"],
    expert_activation: ExpertActivation,
    biases: ExpertBiases | None = None,
) -> Float[Tensor, "N D"]:
    """The experts' outputs with tokens sorted by expert: two calls for all experts. The sum over K runs in the token's
    own order, so that a row does not depend on the others. Weights multiply the hidden layer, which is narrower than
    the output, and so the biases of the output by themselves."""
    if dtype := autocast_dtype(x):
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    permutation = ExpertPermutation.from_topk_ids(topk_ids, gate_up.shape[0])
    h = GroupedLinear.apply(permutation.permute(x), gate_up, permutation.offsets)  # type: ignore[no-untyped-call]
    if biases is not None:
        h = h + biases.gate_up.to(h.dtype).index_select(0, topk_ids.flatten().index_select(0, permutation.order))
    h = expert_activation(h)
    h = h * topk_weights.flatten().index_select(0, permutation.order)[:, None].to(h.dtype)
    out = permutation.unpermute(GroupedLinear.apply(h, down, permutation.offsets))  # type: ignore[no-untyped-call]
    if biases is None:
        return out
    return out + torch.einsum("nk,nkd->nd", topk_weights.to(out.dtype), biases.down.to(out.dtype)[topk_ids])


class Experts(nn.Module):
    """E feed-forward layers as two stacks: gate_up (E,2F,D), gate rows first, and down (E,D,F). Without a gate
    (`expert_activation` given) the first stack is (E,F,D). bias: (E,2F) and (E,D), added to both products.

    A model fills a further slot itself: `expert_activation`, the function between the two."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: Callable[[Tensor], Tensor] = F.silu,
        *,
        expert_activation: ExpertActivation | None = None,
        bias: bool = False,
    ):
        super().__init__()
        self.expert_activation = expert_activation or glu_activation(activation)
        rows = hidden_dim if expert_activation else 2 * hidden_dim
        self.gate_up = nn.Parameter(torch.empty(num_experts, rows, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.gate_up_bias = nn.Parameter(torch.zeros(num_experts, rows)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, dim)) if bias else None
        self.run_experts: ExpertsFunction | None = None

    def forward(self, x: Float[Tensor, "N D"], topk_ids: Tensor, topk_weights: Tensor) -> Float[Tensor, "N D"]:
        run_experts = self.run_experts or fastest_backend(self.gate_up, self.down, x.dtype)
        return run_experts(x, self.gate_up, self.down, topk_ids, topk_weights, self.expert_activation, self.biases)

    @property
    def biases(self) -> ExpertBiases | None:
        if self.gate_up_bias is None or self.down_bias is None:
            return None
        return ExpertBiases(self.gate_up_bias, self.down_bias)

    def packed_rows(self) -> dict[str, tuple[int, ...]]:
        """The matrices of each expert: gate, up and down."""
        rows, hidden_dim = self.gate_up.shape[1], self.down.shape[2]
        return {"gate_up": (hidden_dim,) * (rows // hidden_dim), "down": (self.down.shape[1],)}


def fastest_backend(
    gate_up: Float[Tensor, "E F2 D"], down: Float[Tensor, "E D F"], dtype: torch.dtype
) -> ExpertsFunction:
    """The grouped kernel does not take float64, and needs rows of a multiple of 16 bytes."""
    rows = [gate_up.shape[2], down.shape[2]]
    aligned = all(row * dtype.itemsize % 16 == 0 and row % 8 == 0 for row in rows)
    return run_experts_grouped_mm if dtype != torch.float64 and aligned else run_experts_for_loop
