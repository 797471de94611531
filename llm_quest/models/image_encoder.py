"""The image encoder: embed, enter, blocks, norm, head. Not inherited from: families differ by the modules
they pass. Below it, how config.json spells the sides of images and the classes of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.contracts import ModelSpec
from llm_quest.errors import DataError
from llm_quest.layers.linear import row_splits
from llm_quest.models.config_fields import Json
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
    enter: before the blocks (CLIP normalizes there). Images are as `data.images` prepares them: numbers with the
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


def read_square_size(hf_config: Json, name: str, hf_default: int) -> int:
    """A side in pixels; [224, 224] is 224."""
    value = hf_default if hf_config.get(name) is None else hf_config[name]
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int:
        raise DataError(f"config.json: {name} is {value!r}; only square images and patches are read")
    return value


def read_label_names(hf_config: Json) -> tuple[str, ...]:
    """`id2label` in the order of its ids; a config that leaves it out has transformers' two classes."""
    id2label = hf_config.get("id2label")
    id2label = {"0": "LABEL_0", "1": "LABEL_1"} if id2label is None else id2label
    if not isinstance(id2label, Mapping) or {str(i) for i in range(len(id2label))} != {str(key) for key in id2label}:
        raise DataError("config.json: id2label must name every class from 0 on, each once: {'0': 'cat', '1': 'dog'}")
    return tuple(str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0])))


def default_label_names(num_labels: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(num_labels))


def read_custom_label_names(c: Any) -> tuple[str, ...]:
    """The names of the classes; none where they are only numbered."""
    names = read_label_names(c.json)
    return () if names == default_label_names(len(names)) else names


def write_label_names(names: tuple[str, ...], config: Any) -> dict[str, Any]:
    numbered = list(enumerate(names or default_label_names(config.num_labels)))
    return {"id2label": {str(i): name for i, name in numbered}, "label2id": {name: i for i, name in numbered}}
