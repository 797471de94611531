"""A decoder that is shown images: early fusion, as a class of its own, for every encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.contracts import Card
from llm_quest.errors import UsageError
from llm_quest.layers.cache import Cache
from llm_quest.layers.projections import row_splits
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.scope import Scope

PARTS = ("tower", "adapter", "decoder")


class VisionLanguage(nn.Module):
    """`model(tokens (B,T), scope=None, vision=None) -> logits (B,T,V)`: a decoder that may be given what an image
    encoder saw.

    vision: `model.see(images)`, one vector for each placeholder of this pass, in reading order over the batch. Without
    images it is a decoder as any other. What the patches do not read (the encoder's last blocks and norm) is never
    trained."""

    def __init__(self, card: Card, *, tower: ImageEncoder, adapter: nn.Module, decoder: Decoder):
        super().__init__()
        self.card = card
        self.tower = tower
        self.adapter = adapter
        self.decoder = decoder
        self.generation: GenerationDefaults | None = None
        for unread in (*tower.blocks[card.config.depth :], tower.norm):
            unread.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The numbers this model was assembled from."""
        return self.card.config

    @property
    def head(self) -> nn.Module:
        """The decoder's."""
        return self.decoder.head

    def see(self, images: Float[Tensor, "M C H W"]) -> Float[Tensor, "M N D"]:
        """Each image as the decoder's vectors."""
        seen = self.tower.stream(images, self.config.depth)
        return self.adapter(seen if self.config.keep_class else seen[:, 1:])

    def forward(
        self, tokens: Int[Tensor, "B T"], scope: Scope | None = None, vision: Tensor | None = None
    ) -> Float[Tensor, "B T V"]:
        return self.head(self.hidden(tokens, scope, vision))

    def hidden(
        self, tokens: Int[Tensor, "B T"], scope: Scope | None = None, vision: Tensor | None = None
    ) -> Float[Tensor, "B T D"]:
        """What the head reads. vision (M,N,D) or (K,D). ValueError where placeholders and vectors are not as many."""
        scope = Scope.plain(tokens) if scope is None else scope
        if vision is None:
            return self.decoder.hidden(tokens, scope)
        vectors = vision.reshape(-1, vision.shape[-1])
        where = (tokens == self.config.image_token) & (scope.positions >= 0)
        if not torch.compiler.is_compiling() and int(where.sum()) != vectors.shape[0]:
            raise UsageError(
                f"tokens hold {int(where.sum())} placeholders (image_token {self.config.image_token}), but the images "
                f"give {vectors.shape[0]} vectors: write {self.config.image_tokens} placeholders for every image"
            )
        return self.decoder.hidden(tokens, scope.giving(where, vectors))

    def looking(self, images: Sequence[Tensor]) -> Looking:
        """This model with the images (M,C,H,W) of every prompt in view, for `generate`: row b's prompt has a run of
        placeholders for each of images[b]."""
        return Looking(self, images)

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> Cache:
        """The decoder's: an empty cache for `batch` rows and positions below `capacity`, images included."""
        return self.decoder.new_cache(batch, capacity, slack)

    def row_splits(self) -> dict[str, tuple[int, ...]]:
        """Parameters that are several matrices stacked by rows, and how many rows each has (Muon works on each
        alone)."""
        return row_splits(self)

    def train_only(self, parts: Iterable[str]) -> VisionLanguage:
        """Freeze the other parts (of tower, adapter, decoder): first the adapter alone, then all but the tower, say."""
        parts = tuple(parts)
        if unknown := [part for part in parts if part not in PARTS]:
            raise UsageError(f"no part is called {unknown[0]!r}; parts: {', '.join(PARTS)}")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(parts) and self.is_read(name))
        return self

    def is_read(self, name: str) -> bool:
        """Does this parameter have a share in the logits?"""
        words = name.split(".")
        beyond = words[:2] == ["tower", "blocks"] and int(words[2]) >= self.config.depth
        return not beyond and words[:2] != ["tower", "norm"]


class Looking(nn.Module):
    """A VisionLanguage as a plain decoder whose prompts have images: what `generate` drives.

    The pass that reads the prompts (more than one token) is given their images; the passes after it read text alone."""

    def __init__(self, model: VisionLanguage, images: Sequence[Tensor]):
        super().__init__()
        self.model = model
        self.images = list(images)
        self.train(model.training)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def generation(self) -> GenerationDefaults | None:
        return self.model.generation

    @property
    def head(self) -> nn.Module:
        return self.model.head

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> Cache:
        return self.model.new_cache(batch, capacity, slack)

    def forward(self, tokens: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T V"]:
        return self.head(self.hidden(tokens, scope))

    def hidden(self, tokens: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        if tokens.shape[1] == 1:
            return self.model.hidden(tokens, scope)
        if tokens.shape[0] != len(self.images):
            raise UsageError(
                f"this pass reads {tokens.shape[0]} prompts, and images were given for {len(self.images)}: "
                "one list of images for each prompt (a window that slides would leave them behind: make the context "
                "long enough)"
            )
        there = [images for images in self.images if len(images)]
        if not there:
            return self.model.hidden(tokens, scope)
        return self.model.hidden(tokens, scope, self.model.see(torch.cat(there).to(tokens.device)))
