"""Multi-token prediction added to any decoder (DeepSeek-V3, arXiv:2412.19437, section 2.2): modules of the page's own
block, each predicting one token further ahead (`layers/multi_token.py` shows the chain). The objective trains them by
its weight `lookahead`; drafting uses them; the model's own logits are what they were."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llm_quest.errors import UsageError
from llm_quest.layers.multi_token import Lookahead
from llm_quest.models.build import Unfilled, skeleton
from llm_quest.techniques.card import Model, applied, furnished, require_decoder


@dataclass(frozen=True)
class MultiToken:
    """depth: how many modules. seed: of their first values."""

    depth: int = 1
    seed: int = 0
    neutral_at_birth: ClassVar[bool] = True
    published: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UsageError(f"depth {self.depth}: at least one module is added")

    def __call__(self, model: Model) -> Model:
        require_decoder(model, self)
        if len(model.lookahead):
            raise ValueError(f"this model has lookahead modules already ({len(model.lookahead)}): train those")
        for k in range(self.depth):
            model.lookahead.append(furnished(lookahead(model.config), model, self.seed + k))
        return applied(model, self)


def lookahead(config: Any) -> nn.Module:
    """One module like the page's last layer, without memory."""
    page = skeleton(config)
    embed_norm, hidden_norm, norm = (copy.deepcopy(page.norm) for _ in range(3))
    with torch.device("meta"), Unfilled():
        join = nn.Linear(2 * config.width, config.width, bias=False)
    return Lookahead(embed_norm=embed_norm, hidden_norm=hidden_norm, join=join, block=page.blocks[-1], norm=norm)
