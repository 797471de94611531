"""Int8 weights for inference (Dettmers et al. 2022, arXiv:2208.07339) in the row-wise absmax form of Khudia et al.
2021, from which that paper's vector-wise form starts (section 3): every matrix of the blocks and the head as integers
with one scale per row (`layers.int8`).

The edited model differs slightly: W is rounded to 1/127 of each row's largest number. Norms, biases, routers,
convolutions and position embeddings stay floats. For inference alone: the integers have no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn

from llm_quest.errors import UsageError
from llm_quest.layers.int8 import Int8Embedding, Int8Experts, Int8Linear, Int8Matrix, Int8PackedLinear
from llm_quest.layers.linear import LMHead, PackedLinear
from llm_quest.layers.low_rank import adapter_layers
from llm_quest.layers.moe import Experts
from llm_quest.techniques.model_spec import record_technique, replace_module, require_not_applied

Model = TypeVar("Model", bound=Any)


@dataclass(frozen=True)
class Int8Weights:
    """Quantizes weights to a quarter of float32's memory; a token reads as much less."""

    is_identity_at_init: ClassVar[bool] = False
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        require_not_applied(model, self)
        if adapter_layers(model):
            raise UsageError(
                "this model has an adapter: merge it first (techniques.lora.merge_adapter), then make it int8"
            )
        model.requires_grad_(False)
        heads = [(path, module) for path, module in model.named_modules() if isinstance(module, LMHead)]
        for path, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                replace_module(model, path, Int8PackedLinear(Int8Matrix(module.weight), module.bias, module.parts))
            elif isinstance(module, nn.Linear) and not isinstance(module, LMHead):
                replace_module(model, path, Int8Linear(Int8Matrix(module.weight), module.bias))
            elif isinstance(module, Experts):
                replace_module(
                    model,
                    path,
                    Int8Experts(Int8Matrix(module.gate_up), Int8Matrix(module.down), module.expert_activation),
                )
        for path, head in heads:
            quantize_head(model, path, head)
        return record_technique(model, self)


def quantize_head(model: nn.Module, path: str, head: LMHead) -> None:
    """Quantize a head, and the embedding that it is tied to, as one matrix."""
    matrix = Int8Matrix(head.weight)
    for other, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and module.weight is head.weight:
            replace_module(model, other, Int8Embedding(matrix))
    replace_module(model, path, Int8Linear(matrix, None, head.softcap))
