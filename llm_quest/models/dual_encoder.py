"""A text encoder, and two encoders whose vectors of a matching image and text point the same way (CLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.contracts import ModelSpec
from llm_quest.errors import UsageError
from llm_quest.models.decoder import GenerationConfig
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.scope import Scope

LARGEST_ID = 2
"""The eos_token_id of folders in which the end token is the largest id of a row."""
LOGIT_SCALE = 2.6592
"""ln(1 / 0.07), where training begins."""


class TextEncoder(nn.Module):
    """`model(input_ids (B,T), scope=None) -> (B,P)`: what the head makes of each text's end token. A token sees those
    before it. Padding has position -1 in the scope; on the right it may be the end token again."""

    def __init__(
        self, spec: ModelSpec, *, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module, head: nn.Module
    ):
        super().__init__()
        self.spec = spec
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head
        self.generation_config: GenerationConfig | None = None

    @property
    def config(self) -> Any:
        """The numbers this model was assembled from."""
        return self.spec.config

    def forward(self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B P"]:
        hidden = self.hidden_states(input_ids, scope)
        return self.head(hidden[torch.arange(len(hidden), device=hidden.device), self.end_places(input_ids)])

    def hidden_states(self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        """Every token after the last block and the final norm."""
        scope = (Scope.unpadded(input_ids) if scope is None else scope).with_input_ids(input_ids)
        x = self.embed(input_ids, scope)
        for layer, block in enumerate(self.blocks):
            x = block(x, scope.for_layer(layer))
        return self.norm(x)

    def end_places(self, input_ids: Int[Tensor, "B T"]) -> Tensor:
        """Where each text ends, (B,). UsageError for a text without its end token."""
        if self.config.eos_token_id == LARGEST_ID:
            return input_ids.argmax(dim=1)
        is_end = input_ids == self.config.eos_token_id
        if not torch.compiler.is_compiling() and not bool(is_end.any(dim=1).all()):
            raise UsageError(f"a text has no end token ({self.config.eos_token_id}): encode it with special tokens")
        return is_end.int().argmax(dim=1)


class CLIPModel(nn.Module):
    """`model(input_ids (N,T), images (M,C,H,W), scope=None) -> logits_per_image (M,N)`: how well each text fits each
    image. scope: of the texts."""

    def __init__(self, spec: ModelSpec, image_encoder: ImageEncoder, text_encoder: TextEncoder):
        super().__init__()
        self.spec = spec
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.generation_config: GenerationConfig | None = None

    @property
    def config(self) -> Any:
        """The numbers this model was assembled from."""
        return self.spec.config

    def forward(
        self, input_ids: Int[Tensor, "N T"], images: Float[Tensor, "M C H W"], scope: Scope | None = None
    ) -> Float[Tensor, "M N"]:
        image_embeds = F.normalize(self.get_image_features(images), dim=-1)
        text_embeds = F.normalize(self.get_text_features(input_ids, scope), dim=-1)
        return self.logit_scale.exp() * image_embeds @ text_embeds.mT

    def get_image_features(self, images: Float[Tensor, "M C H W"]) -> Float[Tensor, "M P"]:
        """Images in the shared space, not normalized."""
        return self.image_encoder(images)

    def get_text_features(self, input_ids: Int[Tensor, "N T"], scope: Scope | None = None) -> Float[Tensor, "N P"]:
        """Texts in the shared space, not normalized."""
        return self.text_encoder(input_ids, scope)
