"""The attention layers of a model, for the techniques that act on them."""

from __future__ import annotations

from typing import Any

from torch import nn

from llm_quest.contracts import Technique
from llm_quest.errors import UsageError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.latent_attention import MultiHeadLatentAttention

Attention = GroupedQueryAttention | MultiHeadLatentAttention


def attention_layers(model: nn.Module, technique: Technique) -> list[Any]:
    """Every attention layer, those of multi-token modules included. UsageError if there is none."""
    found = [module for module in model.modules() if isinstance(module, Attention)]
    if not found:
        raise UsageError(f"{type(technique).__name__} acts on attention, and this model has none: leave it out")
    return found
