"""Attention taps: chosen layers leave their attention weights in the pass's records, for whoever asked
(`Scope(..., records={})`), and no logit moves. The weights are worked out a second time, explicitly, since the fused
kernel does not give them away; they carry gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.errors import UsageError
from llm_quest.layers.attention import AttentionInputs, attention_weights
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.scope import Scope
from llm_quest.techniques.attention_layers import Attention
from llm_quest.techniques.model_spec import Model, require_decoder

RECORD_NAME = "attention"


class TappedAttention(NamedTuple):
    """What a tap leaves in the records under "attention": which layer, and weights (B,H,T,S)."""

    layer: int
    weights: Float[Tensor, "B H T S"]


@dataclass(frozen=True)
class AttentionTaps:
    """layers: which, from 0, or from -1 backwards."""

    layers: tuple[int, ...] = (-1,)
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = True

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
            if any(isinstance(watch, AttentionTapObserver) for watch in mixer.observers):
                raise ValueError(f"layer {layer} has a tap already")
            mixer.observers.append(AttentionTapObserver(layer))
        return model


class AttentionTapObserver(nn.Module):
    """A watch that records."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def forward(self, inputs: AttentionInputs, scope: Scope) -> None:
        if scope.records is not None:
            q, k, visible, scale, sink, cap = inputs
            scope.record(
                RECORD_NAME,
                TappedAttention(self.layer, attention_weights(q, k, visible, scale=scale, sink=sink, softcap=cap)),
            )
