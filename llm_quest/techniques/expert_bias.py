"""Auxiliary-loss-free load balancing (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3 eq. 16): after every step, each
expert's bias rises by `rate` if it received fewer tokens than the mean and falls by it if more. The bias takes part in
the choice of experts and not in their weights, so that balancing adds no gradient to the loss.

Commonly got wrong: it happens once per optimizer step, over the whole step's tokens on all ranks; never in evaluation,
never during a forward pass, which activation checkpointing repeats; the load of a skipped step is not carried into the
next; the bias stays float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from llm_quest.layers.moe import SigmoidRouter


@dataclass(frozen=True)
class ExpertBiasBalancer:
    """A callback for the training loop: b_e += rate * sign(mean(c) - c_e), c_e the tokens that expert e received."""

    rate: float = 0.001

    @torch.no_grad()
    def on_step_end(self, model: nn.Module, step: int) -> None:
        for router in bias_routers(model):
            if router.tokens_per_expert is not None:
                load = router.tokens_per_expert
                if is_distributed():
                    distributed.all_reduce(load)
                router.bias.add_(to_shards(torch.sign(load.mean() - load), router.bias), alpha=self.rate)
                router.tokens_per_expert = None

    def on_step_skipped(self, model: nn.Module) -> None:
        for router in bias_routers(model):
            router.tokens_per_expert = None


def bias_routers(model: nn.Module) -> list[SigmoidRouter]:
    """The routers that are balanced by a bias."""
    return [module for module in model.modules() if isinstance(module, SigmoidRouter)]


def to_shards(full: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process holds in full, sharded as `shard_as` is (FSDP2)."""
    if not is_distributed():
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor  # a second to import, which every load would pay

    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def is_distributed() -> bool:
    """Is this process one of several?"""
    return distributed.is_available() and distributed.is_initialized()
