"""What keeps a mixture of experts' load even, and how even it is: losses and metrics over the routers' decisions.

The routers leave their decisions in the scope's records; nothing is found by walking modules. Padding is never counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.layers.moe import Routing, SigmoidRouter

Term = Callable[[Sequence[Routing]], Tensor]


def load_balancing(routings: Sequence[Routing]) -> Float[Tensor, ""]:
    """E sum_e f_e P_e, with f the share of tokens that chose e and P its mean score, both pooled over all layers:
    transformers' form of the Switch loss (arXiv:2101.03961, eq. 4). At uniform routing it is k, not 1. The gradient
    flows through P."""
    tokens = sum(routing.real.sum() for routing in routings)
    f = sum(routing.load() for routing in routings) / tokens
    P = sum((routing.scores * routing.real[:, None]).sum(dim=0) for routing in routings) / tokens
    return torch.as_tensor(f * P).sum() * routings[0].scores.shape[1]


def sequence_balancing(routings: Sequence[Routing]) -> Float[Tensor, ""]:
    """DeepSeek-V3's complementary loss (arXiv:2412.19437, eq. 17-20), mean over sequences, summed over layers: within
    each sequence sum_e f_e P_e, f_e = E/(K T) times the tokens of whose scores e's is among the K largest, P_e the mean
    of the scores normalised per token. At perfect balance each layer gives 1.

    Commonly got wrong: eq. 18 counts the K largest *scores*, without the bias and without groups, and not the experts
    that were chosen. So the loss sees the imbalance that the bias hides."""
    return torch.stack([sequence_term(routing) for routing in routings]).sum()


def sequence_term(routing: Routing) -> Float[Tensor, ""]:
    experts, top = routing.scores.shape[1], routing.experts.shape[1]
    largest = routing.scores.topk(top, dim=-1).indices
    real = routing.real.view(routing.rows, -1, 1).to(routing.scores.dtype)
    tokens = real.sum(dim=1).clamp(min=1)
    chosen = torch.zeros_like(routing.scores).scatter(1, largest, 1.0).view(routing.rows, -1, experts)
    f = (chosen * real).sum(dim=1) * experts / (top * tokens)
    share = (routing.scores / routing.scores.sum(dim=-1, keepdim=True)).view(routing.rows, -1, experts)
    P = (share * real).sum(dim=1) / tokens
    return (f * P).sum(dim=-1).mean()


def z_loss(routings: Sequence[Routing]) -> Float[Tensor, ""]:
    """Mean over tokens and layers of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5): keeps the router's logits
    small."""
    each = [(r.logits.logsumexp(dim=-1).square() * r.real).sum() / r.real.sum().clamp(min=1) for r in routings]
    return torch.stack(each).mean()


def max_violation(routings: Sequence[Routing]) -> Float[Tensor, ""]:
    """MaxVio (arXiv:2408.15664): (largest load - mean load) / mean load, mean over layers."""
    loads = torch.stack([routing.load() for routing in routings])
    mean = loads.mean(dim=1).clamp(min=1e-9)
    return ((loads.amax(dim=1) - mean) / mean).mean()


def routing_entropy(routings: Sequence[Routing]) -> Float[Tensor, ""]:
    """Entropy in nats of the load over experts, mean over layers; ln E is even."""
    loads = torch.stack([routing.load() for routing in routings])
    p = loads / loads.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return torch.special.entr(p).sum(dim=1).mean()


def note_loads(routings: Sequence[Routing]) -> None:
    """Add what each balanced router received to its count, for the callback after the step."""
    for routing in routings:
        if isinstance(routing.router, SigmoidRouter):
            received = routing.load().detach()
            routing.router.load = received if routing.router.load is None else routing.router.load + received


TERMS: dict[str, Term] = {
    "load_balancing": load_balancing,
    "sequence_balancing": sequence_balancing,
    "z_loss": z_loss,
}
METRICS: dict[str, Term] = {"max_violation": max_violation, "routing_entropy": routing_entropy}
