"""Sparse mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): a router sends each token to K of E feed-forward
layers.

A router says which experts and with what weights; the experts do the work in one of two forms. `loop` is the
definition: for each expert, its tokens. `grouped` sorts the tokens by expert and multiplies each run of rows by its
expert's matrix in one call. A law holds them equal. Routing is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.grouped import GroupedLinear, Sorting
from llm_quest.scope import Scope


class Routing(NamedTuple):
    """One layer's decisions for N tokens, left in the scope's records under "routing" for losses, metrics and
    callbacks.

    scores (N,E): what the router thinks of each expert (softmax or sigmoid). logits (N,E). experts (N,K), weights
    (N,K): the choice. real (N): False for padding. router: who decided (its bias may be balanced after the step). rows:
    how many rows (sequences) the N tokens come from."""

    scores: Float[Tensor, "N E"]
    logits: Float[Tensor, "N E"]
    experts: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    real: Bool[Tensor, " N"]
    router: nn.Module
    rows: int

    def load(self) -> Float[Tensor, " E"]:
        """How many real tokens each expert received."""
        received = self.real[:, None].expand(self.experts.shape).flatten().to(torch.float32)
        return received.new_zeros(self.scores.shape[1]).scatter_add(0, self.experts.flatten(), received)


class SoftmaxRouter(nn.Module):
    """Mixtral's and Qwen3's: softmax over all experts, the K largest, weights renormalised to sum 1 if
    `renormalize`. balance: the coefficient of the load-balancing loss that its family is trained with, for recipes."""

    def __init__(self, width: int, experts: int, *, top: int, renormalize: bool, balance: float = 0.001):
        super().__init__()
        check_top(top, experts)
        self.top, self.renormalize, self.balance = top, renormalize, balance
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight.to(x.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits.softmax(dim=-1)
        weights, experts = scores.topk(self.top, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return scores, logits, experts, weights

    def fill_(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)


class SigmoidRouter(nn.Module):
    """DeepSeek-V3's (arXiv:2412.19437, eq. 12-16): sigmoid scores; a bias that balances the load *chooses* but never
    weighs; experts lie in `groups`, of which the `top_groups` best (by the sum of their two best) take part.

    load (E): tokens received since the last balancing step; the objective adds to it, the balancing callback empties
    it.

    Commonly got wrong: dropped groups are -inf, not 0 (biased scores may be negative); the weights are the unbiased
    scores, renormalised, times `scale`. The bias is float32 whatever the model's dtype, without gradient, and changes
    only in a callback after the step."""

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        top: int,
        groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
    ):
        super().__init__()
        check_top(top, experts)
        if experts % groups or top_groups > groups:
            raise ValueError(f"{experts} experts do not form {groups} equal groups of which {top_groups} are taken")
        if top > experts // groups * top_groups:
            raise ValueError(
                f"top {top} of {top_groups} groups of {experts // groups} experts: fewer than asked are left"
            )
        self.top, self.groups, self.top_groups = top, groups, top_groups
        self.load: Tensor | None = None
        self.renormalize, self.scale = renormalize, scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = logits.sigmoid()
        experts = self.allowed(scores.detach() + self.bias.to(wide)).topk(self.top, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return scores, logits, experts, weights * self.scale

    def allowed(self, choice: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """`choice` with the experts of all but the best groups at -inf."""
        if self.groups == 1:
            return choice
        grouped = choice.unflatten(1, (self.groups, -1))
        worth = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(dim=-1)
        best = torch.zeros_like(worth, dtype=torch.bool).scatter(1, worth.topk(self.top_groups, dim=-1).indices, True)
        return grouped.masked_fill(~best[:, :, None], float("-inf")).flatten(1)

    def fill_(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`model.to(dtype)` moves the bias but leaves it float32: in bfloat16 its steps of 0.001 would be rounded
        away."""
        before = self.bias.detach()
        super()._apply(fn, recurse)
        if before.device.type != "meta" and self.bias.dtype != before.dtype:
            self.bias = nn.Parameter(before.to(self.bias.device), requires_grad=False)
        return self


def check_top(top: int, experts: int) -> None:
    if not 0 < top <= experts:
        raise ValueError(f"top {top} of {experts} experts: choose between 1 and {experts}")


class Work(Protocol):
    """How the experts' work is done: x (N,D), gate_up (E,2F,D), down (E,D,F), experts (N,K), weights (N,K) -> (N,D)."""

    def __call__(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        experts: Tensor,
        weights: Tensor,
        inner: Callable[[Tensor], Tensor],
    ) -> Tensor: ...


Inner = Callable[[Tensor], Tensor]


def gated(activation: Callable[[Tensor], Tensor]) -> Inner:
    """What happens between an expert's two matrices: (..., 2F) -> activation(gate) * up (..., F)."""

    def inner(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return activation(gate) * up

    return inner


def relu_squared(h: Tensor) -> Tensor:
    """max(h, 0)^2, without a gate (So et al. 2021, arXiv:2109.08668): Nemotron's experts."""
    return F.relu(h).square()


def loop(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    experts: Int[Tensor, "N K"],
    weights: Float[Tensor, "N K"],
    inner: Inner,
) -> Float[Tensor, "N D"]:
    """The definition: each expert works on its tokens. (unbind, not an index: the backward of `weight[e]` builds a
    gradient of the full size for every expert.)"""
    out = torch.zeros_like(x)
    for expert, (w_in, w_out) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = torch.where(experts == expert)
        y = F.linear(inner(F.linear(x[token], w_in)), w_out)
        out = out.index_add(0, token, (y * weights[token, slot, None].to(y.dtype)).to(out.dtype))
    return out


def grouped(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    experts: Int[Tensor, "N K"],
    weights: Float[Tensor, "N K"],
    inner: Inner,
) -> Float[Tensor, "N D"]:
    """The same, tokens sorted by expert: two calls for all experts. The sum over K runs in the token's own order, so a
    row does not depend on its neighbours. Weights multiply the hidden layer, which is narrower than the output."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    sorting = Sorting.of(experts, gate_up.shape[0])
    h = inner(GroupedLinear.apply(sorting.spread(x), gate_up, sorting.ends))  # type: ignore[no-untyped-call]
    h = h * weights.flatten().index_select(0, sorting.order)[:, None].to(h.dtype)
    return sorting.collect(GroupedLinear.apply(h, down, sorting.ends))  # type: ignore[no-untyped-call]


class Experts(nn.Module):
    """E feed-forward layers as two stacks: gate_up (E,2F,D), gate rows first, and down (E,D,F). Without a gate (`inner`
    given) the first stack is (E,F,D)."""

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = F.silu,
        *,
        inner: Inner | None = None,
    ):
        super().__init__()
        self.inner = inner or gated(activation)
        self.gate_up = nn.Parameter(torch.empty(experts, hidden if inner else 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.work: Work | None = None

    def forward(self, x: Float[Tensor, "N D"], experts: Tensor, weights: Tensor) -> Float[Tensor, "N D"]:
        work = self.work or self.fastest(x.dtype)
        return work(x, self.gate_up, self.down, experts, weights, self.inner)

    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Each expert's matrices: gate and up apart, and down."""
        rows, hidden = self.gate_up.shape[1], self.down.shape[2]
        return {"gate_up": (hidden,) * (rows // hidden), "down": (self.down.shape[1],)}

    def fastest(self, dtype: torch.dtype) -> Work:
        """The grouped kernel knows no float64, and rows must be multiples of 16 bytes."""
        rows = [self.gate_up.shape[2], self.down.shape[2]]
        aligned = all(row * dtype.itemsize % 16 == 0 and row % 8 == 0 for row in rows)
        return grouped if dtype != torch.float64 and aligned else loop


class MixtureOfExperts(nn.Module):
    """sum over the chosen of weight * expert(x), plus what all tokens share.

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
        experts, weights = leave(self.router, flat, x, scope)
        out = self.experts(flat, experts, weights).to(x.dtype)
        if self.shared is not None:
            always = self.shared(x, scope)
            always = always if self.shared_gate is None else always * self.shared_gate(x).sigmoid()
            return out.view_as(x) + always
        return out.view_as(x)


class LatentMixture(nn.Module):
    """LatentMoE (NVIDIA Nemotron 3, 2025): the routed experts work in a narrower latent space, so that more of them,
    and more a token, cost the same. x goes down once, its experts' weighted sum comes up once; router and shared expert
    see all of x.

    latent: its width. With a ratio r = width / latent, experts and top are taken r times as many as without."""

    def __init__(self, width: int, latent: int, router: nn.Module, experts: Experts, shared: nn.Module):
        super().__init__()
        if experts.gate_up.shape[2] != latent:
            raise ValueError(
                f"experts of width {experts.gate_up.shape[2]} cannot work in a latent space of width {latent}"
            )
        self.to_latent = nn.Linear(width, latent, bias=False)
        self.router = router
        self.experts = experts
        self.down = nn.Linear(latent, width, bias=False)
        self.shared = shared

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        flat = x.flatten(0, 1)
        experts, weights = leave(self.router, flat, x, scope)
        mixed = self.experts(self.to_latent(flat), experts, weights).to(x.dtype)
        return self.down(mixed).view_as(x) + self.shared(x, scope)


def leave(router: nn.Module, flat: Tensor, x: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """Ask the router for experts and weights (N,K), and leave its decisions in the scope's records."""
    scores, logits, experts, weights = router(flat)
    real = (scope.positions >= 0).expand(x.shape[:2]).flatten()
    scope.record("routing", Routing(scores, logits, experts, weights, real, router, x.shape[0]))
    return experts, weights
