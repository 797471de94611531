"""ExpertLoadMonitor: reports experts that get no tokens while a mixture of experts is trained.

An expert that its router never chooses has no gradient and never comes back by itself; in the end a router sends all
tokens to the same few (router collapse).

Commonly got wrong: the tokens of one process counted where each has other rows; padding counted, which all goes to one
place; a small step taken for proof (an expert that is owed few tokens may well get none)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_quest.contracts import ObservableRouter, format_list
from llm_quest.train.parallel import DistributedContext

INTERVAL = 20
"""Steps between two checks."""
LEAST_TOKENS = 200
"""Tokens that an expert would have got by now if the load were even: fewer prove nothing."""


@dataclass
class ExpertLoadMonitor:
    """`update(step)` after each step: a message that names the routers with newly dead experts; empty between two
    checks and where there is nothing new. dead: by router, as of the last check. last_healthy: step of the last check
    without dead experts; None before one."""

    model: nn.Module
    parallel: DistributedContext
    interval: int = INTERVAL
    dead: dict[str, tuple[int, ...]] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    last_healthy: int | None = None

    def __post_init__(self) -> None:
        self.routers: dict[str, ObservableRouter] = {  # isinstance reads `weight`, which an adapter computes
            name: module
            for name, module in self.model.named_modules()
            if "observe_routing" in vars(module) and module.weight.requires_grad
        }

    def start(self) -> None:
        """Count from here on the tokens that each expert gets in passes with gradients."""
        for name, router in self.routers.items():
            self.counts[name] = torch.zeros(router.weight.shape[0], device=self.parallel.device)
            router.observe_routing = partial(count_tokens, self.counts[name])

    def stop(self) -> None:
        for router in self.routers.values():
            router.observe_routing = None

    @torch.no_grad()
    def update(self, step: int) -> str:
        if not self.routers or step % self.interval:
            return ""
        stacked = nn.utils.rnn.pad_sequence(list(self.counts.values()), batch_first=True, padding_value=-1.0)
        received = self.parallel.all_reduce_(stacked.clone()).tolist()
        found: dict[str, tuple[int, ...]] = {}
        for (name, counter), row in zip(self.counts.items(), received, strict=True):
            load = row[: counter.numel()]
            if sum(load) < LEAST_TOKENS * len(load):  # too few to tell: count on
                found |= {name: self.dead[name]} if name in self.dead else {}
                continue
            counter.zero_()
            if dead := tuple(number for number, tokens in enumerate(load) if tokens == 0):
                found[name] = dead
        new = {name: experts for name, experts in found.items() if not set(experts) <= set(self.dead.get(name, ()))}
        self.dead = found
        if not found:
            self.last_healthy = step
        return describe_dead(new, {name: counter.numel() for name, counter in self.counts.items()})


def count_tokens(counter: Tensor, routing: Any) -> None:
    """Add the tokens of a pass with gradients. routing: what a router calls `observe_routing` with."""
    if torch.is_grad_enabled():
        counter.add_(routing.tokens_per_expert().detach())


def describe_dead(dead: dict[str, tuple[int, ...]], sizes: dict[str, int]) -> str:
    """The routers and their dead experts, the first few of them; empty if there is none."""
    if not dead:
        return ""
    listed = [
        f"{name} (expert{'s' * (len(experts) > 1)} {format_list(experts[:4])}"
        f"{f' and {len(experts) - 4} more' * (len(experts) > 4)} of {sizes[name]})"
        for name, experts in list(dead.items())[:3]
    ]
    more = f" and {len(dead) - 3} more routers" if len(dead) > 3 else ""
    return f"dead experts, which got no token in the last steps: {', '.join(listed)}{more}"
