"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): what happens inside a block is forgotten after the
forward pass and computed again on the way back: the memory of one block instead of all, for about a third more time.

It changes no value, no gradient and no name, so it is no part of what a model is: nothing on the card, nothing saved.
Commonly got wrong: dropout must fall the same way the second time (torch keeps the random state of each block).
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
    """Every block is computed twice in training; a pass without gradients is as it was."""

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
    """Inside: every block is computed once, and remembered."""
    checkpointed = {block: block.forward for block in model.modules() if isinstance(block.forward, CheckpointedForward)}
    for block, again in checkpointed.items():
        block.forward = again.forward
    try:
        yield
    finally:
        for block, again in checkpointed.items():
            block.forward = again


class CheckpointedForward:
    """The same function, that remembers its inputs alone."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled() or any(isinstance(one, Scope) and one.cache is not None for one in inputs):
            return self.forward(*inputs)  # what is filed in a cache must not be filed twice
        return checkpoint(self.forward, *inputs, use_reentrant=False)
