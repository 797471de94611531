"""Load-balancing losses and metrics of mixtures of experts, from the decisions of the routers.

Routers write their decisions to the scope's records. Padding is never counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.layers.moe import RouterOutput, SigmoidRouter

RouterTerm = Callable[[Sequence[RouterOutput]], Tensor]


def load_balancing_aux_loss(routings: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """E sum_e f_e P_e within each layer, with f the tokens that chose e, per token, and P its mean score; mean over
    layers (Switch, arXiv:2101.03961, eq. 4; ST-MoE, arXiv:2202.08906). At uniform routing it is k, not 1; where every
    token of a layer goes to the same k experts with all of its score, E. The gradient flows through P.

    Commonly got wrong: layers pooled before the product, as transformers has it; layers that collapse onto different
    experts even out, and the loss is at its optimum. Differs: Switch adds the layers' terms, here their mean is taken,
    so that a coefficient of transformers keeps its size."""
    return torch.stack([load_balancing_aux_loss_over_layers([routing]) for routing in routings]).mean()


def load_balancing_aux_loss_over_layers(routings: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """transformers' form of the load-balancing loss: f and P are pooled over all layers before they are multiplied."""
    tokens = sum(routing.non_padding.sum() for routing in routings)
    f = sum(routing.tokens_per_expert() for routing in routings) / tokens
    P = sum((routing.scores * routing.non_padding[:, None]).sum(dim=0) for routing in routings) / tokens
    return torch.as_tensor(f * P).sum() * routings[0].scores.shape[1]


def sequence_balance_aux_loss(routings: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """DeepSeek-V3's complementary loss (arXiv:2412.19437, eq. 17-20), mean over sequences, summed over layers: within
    each sequence sum_e f_e P_e, f_e = E/(K T) times the tokens of whose scores e's is among the K largest, P_e the mean
    of the scores normalized per token. At perfect balance each layer gives 1.

    Commonly got wrong: eq. 18 counts the K largest *scores*, without the bias and without groups, and not the experts
    that were chosen. So the loss sees the imbalance that the bias hides."""
    return torch.stack([sequence_balance_term(routing) for routing in routings]).sum()


def sequence_balance_term(routing: RouterOutput) -> Float[Tensor, ""]:
    experts, top = routing.scores.shape[1], routing.topk_ids.shape[1]
    largest = routing.scores.topk(top, dim=-1).indices
    real = routing.non_padding.view(routing.num_rows, -1, 1).to(routing.scores.dtype)
    tokens = real.sum(dim=1).clamp(min=1)
    chosen = torch.zeros_like(routing.scores).scatter(1, largest, 1.0).view(routing.num_rows, -1, experts)
    f = (chosen * real).sum(dim=1) * experts / (top * tokens)
    share = (routing.scores / routing.scores.sum(dim=-1, keepdim=True)).view(routing.num_rows, -1, experts)
    P = (share * real).sum(dim=1) / tokens
    return (f * P).sum(dim=-1).mean()


def router_z_loss(routings: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """Mean over tokens and layers of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5): keeps the router's logits
    small."""
    each = [
        (r.logits.logsumexp(dim=-1).square() * r.non_padding).sum() / r.non_padding.sum().clamp(min=1) for r in routings
    ]
    return torch.stack(each).mean()


def max_violation(routings: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """MaxVio (arXiv:2408.15664): (largest load - mean load) / mean load, mean over layers."""
    loads = torch.stack([routing.tokens_per_expert() for routing in routings])
    mean = loads.mean(dim=1).clamp(min=1e-9)
    return ((loads.amax(dim=1) - mean) / mean).mean()


def routing_entropy(routings: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """Entropy in nats of the load over experts, mean over layers; ln E is even."""
    loads = torch.stack([routing.tokens_per_expert() for routing in routings])
    p = loads / loads.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return torch.special.entr(p).sum(dim=1).mean()


def accumulate_tokens_per_expert(routings: Sequence[RouterOutput]) -> None:
    """Adds the load of each balanced router to its count, for the callback after the step."""
    for routing in routings:
        if isinstance(routing.router, SigmoidRouter):
            received = routing.tokens_per_expert().detach()
            routing.router.tokens_per_expert = (
                received if routing.router.tokens_per_expert is None else routing.router.tokens_per_expert + received
            )


ROUTER_LOSSES: dict[str, RouterTerm] = {
    "load_balancing": load_balancing_aux_loss,
    "load_balancing_pooled": load_balancing_aux_loss_over_layers,
    "sequence_balancing": sequence_balance_aux_loss,
    "z_loss": router_z_loss,
}
ROUTING_METRICS: dict[str, RouterTerm] = {"max_violation": max_violation, "routing_entropy": routing_entropy}
