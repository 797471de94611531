"""Attention taps: chosen layers leave their attention weights in the pass's records, for whoever asked
(`Scope(..., records={})`), and no logit moves. The weights are worked out a second time, explicitly, since the fused
kernel does not give them away; they carry gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.errors import UsageError
from llm_quest.layers.attention import Meeting, attention_weights
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.scope import Scope
from llm_quest.techniques.attending import Attention
from llm_quest.techniques.card import Model, require_decoder

NAME = "attention"


class Tapped(NamedTuple):
    """What a tap leaves in the records under "attention": which layer, and weights (B,H,T,S)."""

    layer: int
    weights: Float[Tensor, "B H T S"]


@dataclass(frozen=True)
class Taps:
    """layers: which, from 0, or from -1 backwards."""

    layers: tuple[int, ...] = (-1,)
    neutral_at_birth: ClassVar[bool] = True
    published: ClassVar[bool] = True

    def __call__(self, model: Model) -> Model:
        if not isinstance(model, ImageEncoder):
            require_decoder(model, self)
        depth = len(model.blocks)
        if not self.layers or not all(-depth <= layer < depth for layer in self.layers):
            raise UsageError(f"taps on layers {self.layers}: this model has layers 0 to {depth - 1}")
        for layer in sorted({layer % depth for layer in self.layers}):
            mixer = model.blocks[layer].mixer.layer
            if not isinstance(mixer, Attention):
                raise UsageError(f"layer {layer} has no attention weights to tap: it is a {type(mixer).__name__}")
            if any(isinstance(watch, Tap) for watch in mixer.watchers):
                raise ValueError(f"layer {layer} has a tap already")
            mixer.watchers.append(Tap(layer))
        return model


class Tap(nn.Module):
    """A watch that records."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def forward(self, meeting: Meeting, scope: Scope) -> None:
        if scope.records is not None:
            q, k, visible, scale, sink, cap = meeting
            scope.record(NAME, Tapped(self.layer, attention_weights(q, k, visible, scale=scale, sink=sink, cap=cap)))
