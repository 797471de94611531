"""Quantized weights: every matrix of the blocks and the head in 8 or 4 bits (`layers.weight_formats`).

- `format: int8` (Khudia et al. 2021, the row-wise form from which Dettmers et al. 2022, arXiv:2208.07339, start): W is
  rounded to 1/127 of each row's largest number.
- `format: int4`: 4 bits and a scale for every 32 numbers, as llama.cpp's Q4_0.
- `format: nf4` (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): 4 bits whose levels are quantiles of a normal
  distribution. With `techniques: [{name: quantize, format: nf4}, lora]` a recipe trains an adapter on it.

The edited model differs slightly. Norms, biases, routers, convolutions and position embeddings stay floats; the head,
and an embedding tied to it, have 8 bits in any format. The codes have no gradient: nothing but an adapter is trained.

Commonly got wrong: the adapter is applied after the weights were quantized, and its gradient flows through the
dequantized matrix, which is not kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from llm_quest.errors import UsageError
from llm_quest.layers.experts import Experts
from llm_quest.layers.linear import LMHead, PackedLinear
from llm_quest.layers.low_rank import adapter_layers
from llm_quest.layers.quantized import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedMatrix,
    QuantizedPackedLinear,
)
from llm_quest.layers.weight_formats import FORMATS, HEAD_FORMAT, WeightFormat
from llm_quest.techniques.model_spec import record_technique, replace_module, require_decoder, require_not_applied
from llm_quest.tensor_files import HugePageSlabs

Model = TypeVar("Model", bound=Any)


@dataclass(frozen=True)
class Quantize:
    """Stores matrices in 8 or 4 bits. format: int8, int4 or nf4. A token reads as many bits of each weight."""

    format: Literal["int8", "int4", "nf4"] = "int8"
    is_identity_at_init: ClassVar[bool] = False
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        require_decoder(model, self)
        require_not_applied(model, self)
        if self.format not in FORMATS:
            raise UsageError(f"format is {self.format!r}; expected one of {', '.join(FORMATS)}")
        if adapter_layers(model):
            raise UsageError(
                "this model has an adapter: merge it first (techniques.adapter_merge.merge_adapter) and quantize the "
                "result, or quantize before the adapter is applied"
            )
        model.requires_grad_(False)
        heads = [(path, module) for path, module in model.named_modules() if isinstance(module, LMHead)]
        for path, module in list(model.named_modules()):
            if not isinstance(module, LMHead) and (layer := quantize_layer(module, FORMATS[self.format])) is not None:
                replace_module(model, path, layer)
        for path, head in heads:
            quantize_head(model, path, head)
        move_to_huge_pages(model)
        return record_technique(model, self)


def move_to_huge_pages(model: nn.Module) -> None:
    """Lay codes and scales on the host one behind the other in large pages, as a loaded model has them: a token reads
    them 1.2 times as fast."""
    allocate = HugePageSlabs()
    for matrix in model.modules():
        for part in matrix.parameters() if isinstance(matrix, QuantizedMatrix) else ():
            if part.device.type == "cpu":
                part.data = allocate(part.shape, device="cpu", dtype=part.dtype).copy_(part.data)


def quantize_layer(module: nn.Module, form: WeightFormat) -> nn.Module | None:
    """The layer that replaces this one; None for a layer that keeps its floats."""
    if isinstance(module, PackedLinear):
        return QuantizedPackedLinear(QuantizedMatrix(module.weight, form), module.bias, module.parts)
    if isinstance(module, nn.Linear):
        return QuantizedLinear(QuantizedMatrix(module.weight, form), module.bias)
    if isinstance(module, Experts):
        gate_up, down = QuantizedMatrix(module.gate_up, form), QuantizedMatrix(module.down, form)
        return QuantizedExperts(gate_up, down, module)
    return None


def quantize_head(model: nn.Module, path: str, head: LMHead) -> None:
    """Quantize a head, and the embedding that it is tied to, as one matrix."""
    matrix = QuantizedMatrix(head.weight, HEAD_FORMAT)
    for other, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and module.weight is head.weight:
            replace_module(model, other, QuantizedEmbedding(matrix))
    replace_module(model, path, QuantizedLinear(matrix, None, head.softcap))
