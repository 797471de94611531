"""Hyper-connections added to a finished decoder: its stream becomes n streams, every residual a `HyperConnection`
(`layers/hyper_connections.py` has the mathematics). At birth the logits are the plain model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from llm_quest.errors import UsageError
from llm_quest.layers.block import Add
from llm_quest.layers.hyper_connections import WEIGHTS, Collapse, Copies, HyperConnection, Mean
from llm_quest.models.build import Unfilled
from llm_quest.techniques.card import Model, applied, furnished, refuse_twice, require_decoder

MOST = {"lite": 6}


@dataclass(frozen=True)
class HyperConnections:
    """streams: n. form: static or dynamic (Zhu et al.), manifold (mHC, Sinkhorn) or lite (mHC as a mixture of n!
    permutations). Layer l reads stream l mod n first."""

    streams: int = 4
    form: str = "dynamic"
    neutral_at_birth: ClassVar[bool] = True
    published: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.form not in WEIGHTS:
            raise UsageError(f"no form of hyper-connections is called {self.form!r}; known: {', '.join(WEIGHTS)}")
        most = MOST.get(self.form, 64)
        if not 1 <= self.streams <= most:
            why = " (it weighs n! permutations for every token)" if self.form in MOST else ""
            raise UsageError(f"{self.streams} streams; {self.form} hyper-connections take 1 to {most}{why}")

    def __call__(self, model: Model) -> Model:
        require_decoder(model, self)
        refuse_twice(model, self)
        sublayers = [sublayer for block in model.blocks for sublayer in (block.mixer, block.ffn)]
        for index, sublayer in enumerate(sublayers):
            assert isinstance(sublayer.residual, Add), "only this technique fills the residual's slot"
            sublayer.residual = furnished(self.residual(model.config.width, index), model)
        with torch.device("meta"):
            leave = Mean() if self.form in ("static", "dynamic") else Collapse(model.config.width, self.streams)
        model.enter, model.leave = Copies(self.streams), furnished(leave, model)
        return applied(model, self)

    def residual(self, width: int, index: int) -> nn.Module:
        with torch.device("meta"), Unfilled():
            return HyperConnection(WEIGHTS[self.form](width, self.streams, index % self.streams))
