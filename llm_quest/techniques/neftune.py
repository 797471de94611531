"""NEFTune: noise on the embeddings while a model is fine-tuned (Jain et al. 2023, arXiv:2310.05914, section 2).

      x = embed(tokens) + noise_alpha / sqrt(L D) * e,        e uniform in (-1, 1), one number for each of L tokens and
                                                              D dimensions: the noise of a document has norm
                                                              noise_alpha / sqrt(3), whatever its length

L is the length of a token's own document: padding does not count, nor do the other documents of a packed row.

Commonly got wrong: L taken from the padded width of the batch (transformers' hook), so that the noise on a text depends
on the texts beside it; noise that stays on in evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.errors import UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.techniques.model_spec import Model


@dataclass(frozen=True)
class NEFTune:
    """Adds noise to the embeddings of a model in training mode. noise_alpha: the paper takes 5, 10 or 15."""

    noise_alpha: float = 5.0
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.noise_alpha > 0 and math.isfinite(self.noise_alpha)):
            raise UsageError(
                f"NEFTune's noise_alpha is {self.noise_alpha}; it must be above 0 (the paper's is 5 to 15)"
            )

    def __call__(self, model: Model) -> Model:
        if not isinstance(model, Decoder):
            raise UsageError("NEFTune acts on token embeddings, of which this model has none: take a language model")
        if any(isinstance(hook, EmbeddingNoise) for hook in model.embed._forward_hooks.values()):
            raise ValueError("NEFTune adds noise to this model already; it is applied once")
        model.embed.register_forward_hook(EmbeddingNoise(self.noise_alpha))
        return model


@dataclass(frozen=True)
class EmbeddingNoise:
    """A forward hook on `embed(input_ids, scope, inputs_embeds)`."""

    noise_alpha: float

    def __call__(self, embed: nn.Module, inputs: tuple[Any, ...], x: Float[Tensor, "B T D"]) -> Tensor | None:
        if not embed.training:
            return None
        size = self.noise_alpha / (document_lengths(inputs[1]) * x.shape[-1]).sqrt()
        return x + torch.empty_like(x).uniform_(-1, 1) * size[..., None].to(x.dtype)


def document_lengths(scope: Scope) -> Int[Tensor, "B T"]:
    """For each token the number of tokens of its document; at least 1."""
    exists = (scope.position_ids >= 0).long()
    if scope.segment_ids is None:
        return exists.sum(dim=1, keepdim=True).clamp(min=1).expand_as(exists)
    segments = scope.segment_ids.clamp(min=0)
    return torch.zeros_like(segments).scatter_add_(1, segments, exists).gather(1, segments).clamp(min=1)
