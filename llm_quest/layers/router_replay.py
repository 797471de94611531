"""Router replay: the experts that a rollout's pass chose are chosen again while it is learned from (Routing Replay of
GSPO, arXiv:2507.18071, section 5.3; arXiv:2510.11370).

After an update a router may send a token to other experts than those whose log-probabilities are the old ones, and the
importance ratio jumps although the policy hardly moved. Replayed, the choice is the recorded one; its weights are those
of the present scores, so that routers still learn.

Commonly got wrong: the recorded weights are replayed too, and the routers have no gradient; the choices of the prompt's
tokens are left free, which the completion reads through attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llm_quest.layers.moe import SigmoidRouter, SoftmaxRouter


def find_routers(model: Any) -> list[Any]:
    """Every router of a decoder's blocks, in the order of layers (those of multi-token modules take no part)."""
    return [module for module in model.blocks.modules() if isinstance(module, SoftmaxRouter | SigmoidRouter)]


@contextmanager
def record_routing(model: Any) -> Iterator[list[Tensor]]:
    """Inside, every pass appends the experts that each router chose, (N,K) each, in the order of layers."""
    chosen: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda router, inputs, output: chosen.append(output[2]))
        for router in find_routers(model)
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replay_routing(model: Any, routing: Int[Tensor, "B T C"]) -> Iterator[None]:
    """Inside, a pass over B rows of T tokens sends every token to these experts. routing: of all layers, one behind the
    other, K for each (`stack_routing`)."""
    routers = find_routers(model)
    each = routing.flatten(0, 1).split([router.top_k for router in routers], dim=1)

    def choose(ids: Tensor, router: Any, inputs: Any, output: Any) -> Any:
        scores, logits, *_ = output
        return scores, logits, ids, router.weigh_choice(scores, ids)

    pairs = zip(routers, each, strict=True)
    hooks = [router.register_forward_hook(partial(choose, ids)) for router, ids in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stack_routing(chosen: list[Tensor], rows: int) -> Int[Tensor, "B T C"]:
    """What `record_routing` has of one pass over this many rows, as `replay_routing` takes it."""
    return torch.cat(chosen, dim=1).unflatten(0, (rows, -1))
