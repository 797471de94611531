"""Hyper-connections added to a finished decoder: its residual stream becomes n streams, every residual a
`HyperConnection` (`layers/hyper_connections.py` has the equations). At first the logits are the plain model's.

Commonly got wrong: layers that all begin with the same stream never make the streams differ; the connections' static
weights do not decay, since 0 is not their neutral value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from llm_quest.errors import UsageError
from llm_quest.layers.block import Residual
from llm_quest.layers.hyper_connections import (
    STREAM_WEIGHTS,
    AverageStreams,
    ExpandStreams,
    HyperConnection,
    WeightedStreamSum,
)
from llm_quest.models.build import SkipInit
from llm_quest.techniques.model_spec import (
    Model,
    materialize_part,
    record_technique,
    require_decoder,
    require_not_applied,
)

MAX_STREAMS = {"lite": 6}


@dataclass(frozen=True)
class HyperConnections:
    """Several residual streams instead of one. streams: n. form: static or dynamic (Zhu et al.), manifold (mHC,
    Sinkhorn) or lite (mHC as a mixture of n! permutations). Layer l reads stream l mod n first."""

    streams: int = 4
    form: str = "dynamic"
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.form not in STREAM_WEIGHTS:
            raise UsageError(
                f"no form of hyper-connections is called {self.form!r}; known: {', '.join(STREAM_WEIGHTS)}"
            )
        most = MAX_STREAMS.get(self.form, 64)
        if not 1 <= self.streams <= most:
            why = " (it weighs n! permutations for every token)" if self.form in MAX_STREAMS else ""
            raise UsageError(f"{self.streams} streams; {self.form} hyper-connections take 1 to {most}{why}")

    def __call__(self, model: Model) -> Model:
        require_decoder(model, self)
        require_not_applied(model, self)
        sublayers = [sublayer for block in model.blocks for sublayer in block.sublayers]
        for index, sublayer in enumerate(sublayers):
            assert isinstance(sublayer.residual, Residual), "only this technique fills the residual's slot"
            sublayer.residual = materialize_part(self.build_residual(model.config.hidden_size, index), model)
        with torch.device("meta"):
            leave = (
                AverageStreams()
                if self.form in ("static", "dynamic")
                else WeightedStreamSum(model.config.hidden_size, self.streams)
            )
        model.enter, model.leave = ExpandStreams(self.streams), materialize_part(leave, model)
        return record_technique(model, self)

    def build_residual(self, hidden_size: int, index: int) -> nn.Module:
        with torch.device("meta"), SkipInit():
            return HyperConnection(STREAM_WEIGHTS[self.form](hidden_size, self.streams, index % self.streams))
