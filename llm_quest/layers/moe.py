"""Sparse mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): a router sends each token to K of E feed-forward
layers.

The router chooses experts and weights, in float32; the experts are in `experts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.experts import Experts
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.linear import disable_autocast
from llm_quest.scope import Scope


class RouterOutput(NamedTuple):
    """The routing of one layer for N tokens, recorded in the scope under "routing" for losses, metrics and callbacks.

    scores (N,E): softmax or sigmoid. logits (N,E). topk_ids, topk_weights (N,K): the choice. non_padding (N): False for
    padding. router: the router itself (its bias may be balanced after the step). num_rows: the number of rows
    (sequences) of the N tokens."""

    scores: Float[Tensor, "N E"]
    logits: Float[Tensor, "N E"]
    topk_ids: Int[Tensor, "N K"]
    topk_weights: Float[Tensor, "N K"]
    non_padding: Bool[Tensor, " N"]
    router: nn.Module
    num_rows: int

    def tokens_per_expert(self) -> Float[Tensor, " E"]:
        """How many real tokens each expert received."""
        received = self.non_padding[:, None].expand(self.topk_ids.shape).flatten().to(torch.float32)
        return received.new_zeros(self.scores.shape[1]).scatter_add(0, self.topk_ids.flatten(), received)


def all_experts(scores: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
    """Every expert may be chosen."""
    return scores


@dataclass(frozen=True)
class BestGroups:
    """Scores (N,E) with the experts of all but the best groups at -inf (DeepSeek-V2, arXiv:2405.04434, section 2.2.2):
    E experts form n_group groups, a group is worth its `members` best experts together, topk_group groups stay."""

    n_group: int
    topk_group: int
    members: int

    def __call__(self, scores: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        if self.n_group == 1:
            return scores
        grouped = scores.unflatten(1, (self.n_group, -1))
        group_scores = grouped.topk(min(self.members, grouped.shape[2]), dim=-1).values.sum(dim=-1)
        best = torch.zeros_like(group_scores, dtype=torch.bool).scatter(
            1, group_scores.topk(self.topk_group, dim=-1).indices, True
        )
        return grouped.masked_fill(~best[:, :, None], float("-inf")).flatten(1)

    def check(self, top_k: int, num_experts: int) -> None:
        """Raise ValueError unless the groups are of one size and the best of them hold top_k experts."""
        if num_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"{num_experts} experts do not form {self.n_group} equal groups of which {self.topk_group} are taken"
            )
        if top_k > num_experts // self.n_group * self.topk_group:
            raise ValueError(
                f"top {top_k} of {self.topk_group} groups of {num_experts // self.n_group} experts: fewer than asked "
                "are left"
            )


class SoftmaxRouter(nn.Module):
    """The router of Mixtral and Qwen3: softmax over all experts, the K largest, weights renormalized to sum 1 if
    `norm_topk_prob`. aux_loss_coef: the coefficient of the load-balancing loss that its family is trained with, for
    recipes.

    A model fills further slots itself: `mask_groups`, which experts may be chosen by their scores;
    `routed_scaling_factor`, by which the weights are multiplied; `bias` (E), of the logits. observe_routing: called
    with each pass's RouterOutput, while something counts."""

    def __init__(self, dim: int, num_experts: int, *, top_k: int, norm_topk_prob: bool, aux_loss_coef: float = 0.001):
        super().__init__()
        check_top_k(top_k, num_experts)
        self.top_k, self.norm_topk_prob, self.aux_loss_coef = top_k, norm_topk_prob, aux_loss_coef
        self.mask_groups: Callable[[Tensor], Tensor] = all_experts
        self.routed_scaling_factor = 1.0
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias: nn.Parameter | None = None
        self.observe_routing: Callable[[RouterOutput], None] | None = None

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits.softmax(dim=-1)
        topk_ids = self.mask_groups(scores).topk(self.top_k, dim=-1).indices
        return scores, logits, topk_ids, self.weigh_choice(scores, topk_ids)

    def weigh_choice(self, scores: Float[Tensor, "N E"], topk_ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """The weights of chosen experts."""
        topk_weights = scores.gather(1, topk_ids)
        if self.norm_topk_prob:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return topk_weights * self.routed_scaling_factor

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SigmoidRouter(nn.Module):
    """The router of DeepSeek-V3 (arXiv:2412.19437, eq. 12-16): sigmoid scores; a bias that balances the load takes part
    in the *choice* and not in the weights; experts form `n_group` groups, of which the `topk_group` best (by the sum of
    their two best experts) are eligible.

    tokens_per_expert (E): tokens received since the last balancing step; the objective adds to it, the balancing
    callback resets it. observe_routing: as of SoftmaxRouter.

    Commonly got wrong: groups that are not eligible get -inf, not 0 (biased scores may be negative); the weights are
    the unbiased scores, renormalized, times `routed_scaling_factor`. The bias is float32 whatever the model's dtype,
    has no gradient, and changes only in a callback after the step."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int,
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
    ):
        super().__init__()
        check_top_k(top_k, num_experts)
        self.mask_groups = BestGroups(n_group, topk_group, members=2)
        self.mask_groups.check(top_k, num_experts)
        self.top_k = top_k
        self.tokens_per_expert: Tensor | None = None
        self.observe_routing: Callable[[RouterOutput], None] | None = None
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32), requires_grad=False)
        self.keep_in_fp32 = ("bias",)

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        with disable_autocast(x):
            logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = logits.sigmoid()
        topk_ids = self.mask_groups(scores.detach() + self.bias.to(wide)).topk(self.top_k, dim=-1).indices
        return scores, logits, topk_ids, self.weigh_choice(scores, topk_ids)

    def weigh_choice(self, scores: Float[Tensor, "N E"], topk_ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """The weights of chosen experts: their scores without the bias."""
        topk_weights = scores.gather(1, topk_ids)
        if self.norm_topk_prob:
            topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_weights * self.routed_scaling_factor

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`model.to(dtype)` leaves the bias float32: in bfloat16 its steps of 0.001 would be rounded away."""
        before = self.bias.detach()
        super()._apply(fn, recurse)
        if before.device.type != "meta" and self.bias.dtype != before.dtype:
            self.bias = nn.Parameter(before.to(self.bias.device), requires_grad=False)
        return self


def check_top_k(top_k: int, num_experts: int) -> None:
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top {top_k} of {num_experts} experts: choose between 1 and {num_experts}")


class MixtureOfExperts(nn.Module):
    """The sum over the chosen experts of weight * expert(x), plus the shared experts.

    shared: a feed-forward layer for every token (DeepSeek); shared_gate: its output times sigmoid(gate(x))
    (Qwen3-Next)."""

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        *,
        shared: GatedMLP | None = None,
        shared_gate: nn.Linear | None = None,
    ):
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        flat = x.flatten(0, 1)
        topk_ids, topk_weights = route_tokens(self.router, flat, x, scope)
        out = self.experts(flat, topk_ids, topk_weights).to(x.dtype)
        if self.shared is not None:
            shared_output = self.shared(x, scope)
            shared_output = shared_output if self.shared_gate is None else shared_output * self.shared_gate(x).sigmoid()
            return out.view_as(x) + shared_output
        return out.view_as(x)


class LatentMoE(nn.Module):
    """LatentMoE (NVIDIA Nemotron 3, 2025): the routed experts run in a narrower latent space, so that more of them, and
    more per token, cost the same. x is projected down once, and the experts' weighted sum up once; router and shared
    expert read all of x.

    latent_dim: the width. With a ratio r = D / latent_dim, num_experts and top_k are r times as large as without."""

    def __init__(self, dim: int, latent_dim: int, router: nn.Module, experts: Experts, shared: nn.Module):
        super().__init__()
        if experts.gate_up.shape[2] != latent_dim:
            raise ValueError(
                f"experts of width {experts.gate_up.shape[2]} cannot work in a latent space of width {latent_dim}"
            )
        self.to_latent = nn.Linear(dim, latent_dim, bias=False)
        self.router = router
        self.experts = experts
        self.down = nn.Linear(latent_dim, dim, bias=False)
        self.shared = shared

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        flat = x.flatten(0, 1)
        topk_ids, topk_weights = route_tokens(self.router, flat, x, scope)
        mixed = self.experts(self.to_latent(flat), topk_ids, topk_weights).to(x.dtype)
        return self.down(mixed).view_as(x) + self.shared(x, scope)


def route_tokens(router: nn.Module, flat: Tensor, x: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """Choose experts and weights (N,K), and record the router's output in the scope."""
    scores, logits, topk_ids, topk_weights = router(flat)
    non_padding = (scope.position_ids >= 0).expand(x.shape[:2]).flatten()
    routing = RouterOutput(scores, logits, topk_ids, topk_weights, non_padding, router, x.shape[0])
    scope.record("routing", routing)
    observe: Callable[[RouterOutput], None] | None = router.observe_routing  # type: ignore[assignment]
    if observe is not None:
        observe(routing)
    return topk_ids, topk_weights
