"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): the activations inside a block are discarded after the
forward pass and computed again in the backward pass: the memory of one block instead of all, for about a third more
time.

It changes no value, no gradient and no name, so it is not part of the model: neither spec nor file records it.

Commonly got wrong: dropout must be the same the second time (torch restores the random state of each block).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from llm_quest.errors import UsageError
from llm_quest.layers.block import Block, SingleBlock
from llm_quest.scope import Scope

Model = TypeVar("Model", bound=Any)


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Computes every block twice in training; a pass without gradients is unchanged."""

    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = True

    def __call__(self, model: Model) -> Model:
        blocks = [module for module in model.modules() if isinstance(module, Block | SingleBlock)]
        if any(isinstance(block.forward, CheckpointedForward) for block in blocks):
            raise UsageError("activation checkpointing was applied to this model already; it is applied once")
        for block in blocks:
            block.forward = CheckpointedForward(block.forward)  # type: ignore[assignment, method-assign]
        return model


@contextmanager
def disable_checkpointing(model: Any) -> Iterator[None]:
    """Within this context every block is computed once, and its activations are kept."""
    checkpointed = {block: block.forward for block in model.modules() if isinstance(block.forward, CheckpointedForward)}
    for block, again in checkpointed.items():
        block.forward = again.forward
    try:
        yield
    finally:
        for block, again in checkpointed.items():
            block.forward = again


class CheckpointedForward:
    """The same function, which keeps its inputs alone."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled() or any(isinstance(one, Scope) and one.cache is not None for one in inputs):
            return self.forward(*inputs)  # a cache must not be written twice
        return checkpoint(self.forward, *inputs, use_reentrant=False)
