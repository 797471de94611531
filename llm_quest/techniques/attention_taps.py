"""Attention taps: chosen layers record their attention weights in `Scope(..., records={})`, and no logit changes. The
weights are computed a second time, explicitly, since the fused kernel does not return them; they carry gradients.

Commonly got wrong: weights that are computed a second time need the same sinks and the same soft cap, or they are not
those that mixed the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.errors import UsageError
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.techniques.model_spec import Attention, Model, require_decoder

RECORD_NAME = "attention"


class TappedAttention(NamedTuple):
    """What a tap records under "attention": the layer and its weights (B,H,T,S)."""

    layer: int
    weights: Float[Tensor, "B H T S"]


@dataclass(frozen=True)
class AttentionTaps:
    """Records the attention weights of some layers. layers: which layers to record, counted from 0, or backwards from
    -1."""

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
            mixer = next((module for module in model.blocks[layer].modules() if isinstance(module, Attention)), None)
            if mixer is None:
                kind = type(model.blocks[layer].sublayers[0].layer).__name__
                raise UsageError(f"layer {layer} has no attention weights to tap: it is a {kind}")
            if any(isinstance(module, AttentionTap) for module in mixer.modules()):
                raise ValueError(f"layer {layer} has a tap already")
            mixer.attend.tap = AttentionTap(layer)
            mixer.attend.register_forward_hook(mixer.attend.tap)
        return model


class AttentionTap(nn.Module):
    """A forward hook on `attend` that records its weights."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def forward(self, attend: ScaledDotProduct, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, _, attention_mask, scope = inputs
        if scope.records is not None:
            scope.record(RECORD_NAME, TappedAttention(self.layer, attend.weights(q, k, attention_mask)))
