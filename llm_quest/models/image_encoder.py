"""The image encoder: embed, enter, blocks, norm, head. Not inherited from: families differ by the modules
they pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.contracts import ModelSpec
from llm_quest.layers.linear import row_splits
from llm_quest.models.decoder import GenerationConfig
from llm_quest.scope import Scope


class SquareImages:
    """What follows from the sides of images and patches, for the Config of an image encoder."""

    image_size: int
    patch_size: int

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of an image: the patches and the class token."""
        return self.num_patches + 1


class ImageEncoder(nn.Module):
    """`model(images (B,C,H,W)) -> (B,V)` = head(hidden(images)[:, 0]): what the head makes of the class token, the only
    one that asks in the last block and that its MLP is run on. Every patch sees every patch; no cache.

    embed(images) -> (B,N+1,D), the class token first. positions(images) -> (axes,B,N), where the blocks rotate by them.
    enter: before the blocks (CLIP normalises there). Images are as `data.images` prepares them: numbers with the
    statistics this model was trained with."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        head: nn.Module,
        enter: nn.Module | None = None,
        positions: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.embed = embed
        self.enter = enter or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head
        self.positions = positions
        self.generation_config: GenerationConfig | None = None

    @property
    def config(self) -> Any:
        """The numbers this model was assembled from."""
        return self.spec.config

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V"]:
        x, scope = self.embed_images(images)
        for layer, block in enumerate(self.blocks[:-1]):
            x = block(x, scope.for_layer(layer))
        x = self.blocks[-1](x, scope.for_layer(len(self.blocks) - 1), 1)
        return self.head(self.norm(x)[:, 0])

    def hidden_states(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B T D"]:
        """Class token and patches after the last block and the final norm."""
        return self.norm(self.intermediate_hidden_states(images))

    def intermediate_hidden_states(
        self, images: Float[Tensor, "B C H W"], depth: int | None = None
    ) -> Float[Tensor, "B T D"]:
        """The hidden states before the final norm, after `depth` blocks (None: all): what a language model is shown."""
        x, scope = self.embed_images(images)
        for layer, block in enumerate(self.blocks[:depth]):
            x = block(x, scope.for_layer(layer))
        return x

    def embed_images(self, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, Scope]:
        """What the first block reads, and that everyone sees everyone."""
        x = self.enter(self.embed(images))
        scope = Scope.unpadded(x, bidirectional=True)
        return x, scope if self.positions is None else scope.with_axis_positions(self.positions(images))

    def row_splits(self) -> dict[str, tuple[int, ...]]:
        """Parameters that are several matrices stacked by rows, and how many rows each has (Muon works on each
        alone)."""
        return row_splits(self)
