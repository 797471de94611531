"""One matrix product for many experts: rows sorted by expert, each run of rows times its expert's matrix; and the
permutation of the tokens there and back.

PyTorch's `grouped_mm` computes it. It is wrapped in operators of our own because its shape rule for compiled code takes
bfloat16 only, while the kernel itself takes float32 too: eager and compiled code run the same kernel, forward and
backward. (`torch.library.custom_op` would import torch._dynamo at the first product, over a second of processor time.)
The two permutations are each other's transpose, and neither adds into a place twice, so that the order of
additions is fixed on any device.

Commonly got wrong: the offsets are where runs end, not where they begin; the way back is the inverse of the
permutation, not the permutation; a token's gradient is the sum over all its experts.
"""

from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

COMPILABLE = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    "llm_quest::grouped_product", "(Tensor x, Tensor weight, Tensor offsets) -> Tensor", tags=COMPILABLE
)
torch.library.define("llm_quest::grouped_outer", "(Tensor x, Tensor y, Tensor offsets) -> Tensor", tags=COMPILABLE)


@torch.library.impl("llm_quest::grouped_product", "default")
def compute_grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x (N,I), weight (E,I,O), ends (E,) int32: rows ends[e-1]..ends[e] of x belong to expert e -> (N,O)."""
    return F.grouped_mm(x, weight, offs=offsets)


@torch.library.register_fake("llm_quest::grouped_product")
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.impl("llm_quest::grouped_outer", "default")
def compute_grouped_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """The product of each expert's rows, x_e^T y_e: (N,I), (N,O) -> (E,I,O). An expert without rows gets zeros."""
    return F.grouped_mm(x.transpose(0, 1), y, offs=offsets)


@torch.library.register_fake("llm_quest::grouped_outer")
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


grouped_product, grouped_outer = torch.ops.llm_quest.grouped_product, torch.ops.llm_quest.grouped_outer


class GroupedLinear(Function):
    """x (N,I), weight (E,O,I), ends (E,) -> x W_e^T (N,O). The weight's gradient is computed in the weight's own
    layout: as the transpose of the other one it would be copied once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        return grouped_product(x, weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, offsets = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        return grouped_product(gradient, weight, offsets), grouped_outer(gradient, x.contiguous(), offsets), None


class ExpertPermutation(NamedTuple):
    """The places of N tokens with K experts each among N K rows sorted by expert. order: sorted row -> row (token K +
    k); inverse: its inverse; offsets (E,): where each expert's rows end; top_k: K."""

    order: Int[Tensor, " NK"]
    inverse: Int[Tensor, " NK"]
    offsets: Int[Tensor, " E"]
    top_k: int

    @classmethod
    def from_topk_ids(cls, topk_ids: Int[Tensor, "N K"], num_experts: int) -> Self:
        flat = topk_ids.flatten()
        order = flat.argsort(stable=True)
        counts = flat.new_zeros(num_experts).scatter_add(0, flat, torch.ones_like(flat))
        inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
        return cls(order, inverse, counts.cumsum(0).to(torch.int32), topk_ids.shape[1])

    def permute(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "NK D"]:
        """Copy each token's row to each of its experts."""
        return PermuteTokens.apply(x, self.order, self.inverse, self.top_k)  # type: ignore[no-any-return, no-untyped-call]

    def unpermute(self, y: Float[Tensor, "NK D"]) -> Float[Tensor, "N D"]:
        """The sum of the outputs of a token's experts, in the token's own order."""
        return UnpermuteTokens.apply(y, self.order, self.inverse, self.top_k)  # type: ignore[no-any-return, no-untyped-call]


class PermuteTokens(Function):
    """(N,D) -> (N K,D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.top = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return UnpermuteTokens.apply(gradients[0], *ctx.saved_tensors, ctx.top), None, None, None  # type: ignore[no-untyped-call]


class UnpermuteTokens(Function):
    """(N K,D) -> (N,D). Gathered and summed in one pass: embedding_bag, with each token a bag of its K rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.top = top_k
        return F.embedding_bag(inverse.unflatten(0, (-1, top_k)), y, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return PermuteTokens.apply(gradients[0], *ctx.saved_tensors, ctx.top), None, None, None  # type: ignore[no-untyped-call]
