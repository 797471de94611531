"""Next-token prediction, the objective of pretraining: sum over tokens of -log p(token t+1 | tokens <= t)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llm_quest.contracts import Loss
from llm_quest.errors import UsageError
from llm_quest.objectives.cross_entropy import FORMS, IGNORE, cross_entropy
from llm_quest.scope import Scope

if TYPE_CHECKING:
    from llm_quest.data.batch import TokenBatch


class NextToken(nn.Module):
    """`NextToken(model)(batch) -> Loss`: total in nats, count = learned tokens. form: how the cross-entropy is computed
    (`objectives.cross_entropy.FORMS`); auto takes the one that fits the size and the device. metrics: none of its own."""

    def __init__(self, model: nn.Module, *, form: str = "auto"):
        super().__init__()
        if form not in ("auto", *FORMS):
            raise UsageError(f"no form of the loss is called {form!r}; known: auto, {', '.join(FORMS)}")
        self.model = model
        self.form = form

    def forward(self, batch: TokenBatch) -> Loss:
        x = self.model.hidden(batch.tokens, scope_of(batch))  # type: ignore[operator]
        targets = batch.targets.flatten()
        total = cross_entropy(x.flatten(0, 1), self.model.head.weight, targets, self.form)  # type: ignore[union-attr, arg-type]
        return Loss(total, (targets != IGNORE).sum(dtype=torch.float32), {})


def scope_of(batch: TokenBatch) -> Scope:
    """What the tokens of a batch may see: plain rows, or what positions and segments say."""
    if batch.positions is None:
        return Scope.plain(batch.tokens)
    return Scope(batch.positions, segments=batch.segments)
