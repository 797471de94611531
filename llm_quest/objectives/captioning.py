"""Captions and answers: sum over learned tokens of -log p(token t+1 | image, tokens <= t). The question, the
placeholders and the filling are read and not learned, and no logits are made for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llm_quest.contracts import Loss
from llm_quest.data.batch import IGNORE
from llm_quest.objectives.cross_entropy import cross_entropy

if TYPE_CHECKING:
    from llm_quest.data.sights import SightBatch


class Captioning(nn.Module):
    """`Captioning(model)(batch) -> Loss`: total in nats, count = learned tokens. model: a VisionLanguage. metrics:
    none."""

    def __init__(self, model: nn.Module, *, form: str = "auto"):
        super().__init__()
        self.model = model
        self.form = form

    def forward(self, batch: SightBatch) -> Loss:
        x = self.model.hidden(batch.tokens, vision=self.model.see(batch.images))  # type: ignore[operator]
        head = self.model.head
        targets = batch.targets.flatten()
        learned = targets != IGNORE
        total = cross_entropy(x.flatten(0, 1)[learned], head.weight, targets[learned], self.form, head.cap)  # type: ignore[union-attr, arg-type]
        return Loss(total, learned.sum(dtype=torch.float32), {})
