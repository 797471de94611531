"""A decoder that is shown images: early fusion, as a class of its own, for every encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.contracts import ModelSpec
from llm_quest.errors import UsageError
from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.linear import row_splits
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.scope import Scope

PARTS = ("tower", "adapter", "decoder")


class VisionLanguageModel(nn.Module):
    """`model(tokens (B,T), scope=None, vision=None) -> logits (B,T,V)`: a decoder that may be given what an image
    encoder saw.

    vision: `model.get_image_features(images)`, one vector for each placeholder of this pass, in reading order over the
    batch. Without images it is a decoder as any other. What the patches do not read (the encoder's last blocks and
    norm) is never trained."""

    def __init__(self, spec: ModelSpec, *, tower: ImageEncoder, adapter: nn.Module, decoder: Decoder):
        super().__init__()
        self.spec = spec
        self.tower = tower
        self.adapter = adapter
        self.decoder = decoder
        self.generation_config: GenerationConfig | None = None
        for unread in (*tower.blocks[spec.config.num_vision_blocks :], tower.norm):
            unread.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The numbers this model was assembled from."""
        return self.spec.config

    @property
    def head(self) -> nn.Module:
        """The decoder's."""
        return self.decoder.head

    def get_image_features(self, images: Float[Tensor, "M C H W"]) -> Float[Tensor, "M N D"]:
        """Each image as the decoder's vectors."""
        features = self.tower.intermediate_hidden_states(images, self.config.num_vision_blocks)
        return self.adapter(features if self.config.keep_cls_token else features[:, 1:])

    def forward(
        self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None, image_features: Tensor | None = None
    ) -> Float[Tensor, "B T V"]:
        return self.head(self.hidden_states(input_ids, scope, image_features))

    def hidden_states(
        self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None, image_features: Tensor | None = None
    ) -> Float[Tensor, "B T D"]:
        """What the head reads. vision (M,N,D) or (K,D). ValueError where placeholders and vectors are not as many."""
        scope = Scope.unpadded(input_ids) if scope is None else scope
        if image_features is None:
            return self.decoder.hidden_states(input_ids, scope)
        vectors = image_features.reshape(-1, image_features.shape[-1])
        is_placeholder = (input_ids == self.config.image_token_id) & (scope.position_ids >= 0)
        if not torch.compiler.is_compiling() and int(is_placeholder.sum()) != vectors.shape[0]:
            raise UsageError(
                f"tokens hold {int(is_placeholder.sum())} placeholders (image_token {self.config.image_token_id}), "
                f"but the images give {vectors.shape[0]} vectors: write {self.config.image_seq_length} placeholders "
                "for every image"
            )
        embeds = self.decoder.embed.embed_tokens(input_ids)  # type: ignore[operator]
        inputs_embeds = embeds.masked_scatter(is_placeholder[:, :, None], vectors.to(embeds.dtype))
        return self.decoder.hidden_states(input_ids, scope, inputs_embeds)

    def with_images(self, images: Sequence[Tensor]) -> ImagePromptModel:
        """This model with the images (M,C,H,W) of every prompt in view, for `generate`: row b's prompt has a run of
        placeholders for each of images[b]."""
        return ImagePromptModel(self, images)

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> Cache:
        """The decoder's: an empty cache for `batch` rows and positions below `capacity`, images included."""
        return self.decoder.new_cache(batch_size, capacity, max_rewind)

    def row_splits(self) -> dict[str, tuple[int, ...]]:
        """Parameters that are several matrices stacked by rows, and how many rows each has (Muon works on each
        alone)."""
        return row_splits(self)

    def train_only(self, parts: Iterable[str]) -> VisionLanguageModel:
        """Freeze the other parts (of tower, adapter, decoder): first the adapter alone, then all but the tower, say."""
        parts = tuple(parts)
        if unknown := [part for part in parts if part not in PARTS]:
            raise UsageError(f"no part is called {unknown[0]!r}; parts: {', '.join(PARTS)}")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(parts) and self.affects_logits(name))
        return self

    def affects_logits(self, name: str) -> bool:
        """Does this parameter have a share in the logits?"""
        words = name.split(".")
        unused_block = words[:2] == ["tower", "blocks"] and int(words[2]) >= self.config.num_vision_blocks
        return not unused_block and words[:2] != ["tower", "norm"]


class ImagePromptModel(nn.Module):
    """A VisionLanguage as a plain decoder whose prompts have images: what `generate` drives.

    The pass that reads the prompts (more than one token) is given their images; the passes after it read text alone."""

    def __init__(self, model: VisionLanguageModel, images: Sequence[Tensor]):
        super().__init__()
        self.model = model
        self.images = list(images)
        self.train(model.training)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig | None:
        return self.model.generation_config

    @property
    def head(self) -> nn.Module:
        return self.model.head

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> Cache:
        return self.model.new_cache(batch_size, capacity, max_rewind)

    def forward(self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T V"]:
        return self.head(self.hidden_states(input_ids, scope))

    def hidden_states(self, input_ids: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        if input_ids.shape[1] == 1:
            return self.model.hidden_states(input_ids, scope)
        if input_ids.shape[0] != len(self.images):
            raise UsageError(
                f"this pass reads {input_ids.shape[0]} prompts, and images were given for {len(self.images)}: "
                "one list of images for each prompt (a window that slides would leave them behind: make the context "
                "long enough)"
            )
        image_batches = [images for images in self.images if len(images)]
        if not image_batches:
            return self.model.hidden_states(input_ids, scope)
        return self.model.hidden_states(
            input_ids, scope, self.model.get_image_features(torch.cat(image_batches).to(input_ids.device))
        )
