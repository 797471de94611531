"""Int8 weights for inference (Dettmers et al. 2022, arXiv:2208.07339) in the row-wise absmax form of Khudia
et al. 2021, from which that paper's vector-wise form starts (section 3): every matrix of the blocks and the head as
whole numbers with one scale a row (`layers.int8`).

The edited model is another one, a little: W is rounded to 1/127 of each row's largest number. Norms, biases, routers,
convolutions and position embeddings stay floats. Not for training: nothing learns afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn

from llm_quest.errors import UsageError
from llm_quest.layers.head import Unembed
from llm_quest.layers.int8 import Int8, Int8Embedding, Int8Experts, Int8Linear, Int8Projections
from llm_quest.layers.low_rank import wrappers
from llm_quest.layers.moe import Experts
from llm_quest.layers.projections import Projections
from llm_quest.techniques.card import applied, put, refuse_twice

Model = TypeVar("Model", bound=Any)


@dataclass(frozen=True)
class Int8Weights:
    """A quarter of float32's memory, and up to as much less to read for each token."""

    neutral_at_birth: ClassVar[bool] = False
    published: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        refuse_twice(model, self)
        if wrappers(model):
            raise UsageError("this model has an adapter: merge it first (techniques.lora.merge), then make it int8")
        model.requires_grad_(False)
        heads = [(path, module) for path, module in model.named_modules() if isinstance(module, Unembed)]
        for path, module in list(model.named_modules()):
            if isinstance(module, Projections):
                put(model, path, Int8Projections(Int8(module.weight), module.bias, module.parts))
            elif isinstance(module, nn.Linear) and not isinstance(module, Unembed):
                put(model, path, Int8Linear(Int8(module.weight), module.bias))
            elif isinstance(module, Experts):
                put(model, path, Int8Experts(Int8(module.gate_up), Int8(module.down), module.inner))
        for path, head in heads:
            put_head(model, path, head)
        return applied(model, self)


def put_head(model: nn.Module, path: str, head: Unembed) -> None:
    """A head, and the embedding that it is tied to, as one matrix."""
    matrix = Int8(head.weight)
    for other, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and module.weight is head.weight:
            put(model, other, Int8Embedding(matrix))
    put(model, path, Int8Linear(matrix, None, head.cap))
