"""A decoder that is shown images: early fusion, as a class of its own, for every encoder and decoder.

A family fills three slots beside its parts: how the tower reads images (`encode`), what of the tower is not read
(`unused`), and what a pass with images is to the decoder (`image_scope`): causal as text is (LLaVA), with the tokens of
an image seeing each other (Gemma 3), or with positions on three axes (Qwen3.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_quest.contracts import ModelSpec
from llm_quest.errors import UsageError
from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.linear import row_splits
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.scope import Scope

PARTS = ("tower", "adapter", "decoder")
Encode = Callable[[Any, Tensor], Tensor]
"""(tower, images (M,C,H,W)) -> what the adapter reads of each, (M,...,Dv)."""
ImageShapes = Sequence[tuple[int, ...]]
"""How the vectors of each image of a pass lie: (N,), or (rows, columns)."""
ImageScope = Callable[[Scope, Tensor, ImageShapes], Scope]
"""(scope, placeholders (B,T) bool, the shapes of the images) -> the scope that the decoder reads the pass with."""


@dataclass(frozen=True)
class PatchesOfBlock:
    """The patches after so many blocks, before the final norm; the class token too, if it is kept (LLaVA)."""

    num_blocks: int
    keep_cls_token: bool

    def __call__(self, tower: ImageEncoder, images: Float[Tensor, "M C H W"]) -> Float[Tensor, "M N D"]:
        features = tower.intermediate_hidden_states(images, self.num_blocks)
        return features if self.keep_cls_token else features[:, 1:]


def final_patches(tower: ImageEncoder, images: Float[Tensor, "M C H W"]) -> Float[Tensor, "M N D"]:
    """All tokens after the final norm, for a tower without a class token (SigLIP)."""
    return tower.hidden_states(images)


def causal_images(scope: Scope, is_placeholder: Bool[Tensor, "B T"], shapes: ImageShapes) -> Scope:
    """An image is read as text is."""
    return scope


def bidirectional_images(scope: Scope, is_placeholder: Bool[Tensor, "B T"], shapes: ImageShapes) -> Scope:
    """The tokens of one image, a run of placeholders, attend to each other; everything else is causal (Gemma 3).

    v1 v2 v3 are an image      a  1 . . . .       a window acts as well: it counts
                               v1 1 1 1 1 .       from the token that looks, so that
                               v2 1 1 1 1 .       only what lies behind it is cut
                               v3 1 1 1 1 .
                               b  1 1 1 1 1
    """
    length = is_placeholder.shape[1]
    places = torch.arange(length, device=is_placeholder.device).expand_as(is_placeholder)
    next_text = places.masked_fill(is_placeholder, length).flip(1).cummin(dim=1).values.flip(1)
    last = torch.where(is_placeholder, next_text - 1, places)
    return scope.with_visible_until(scope.position_ids.expand_as(places).gather(1, last))


def three_axis_positions(scope: Scope, is_placeholder: Bool[Tensor, "B T"], shapes: ImageShapes) -> Scope:
    """Time, row and column of every token (Qwen2-VL, arXiv:2409.12191, section 2.1). For text the three are equal. An
    image of (rows, columns) vectors that begins at p has (p, p + row, p + column), and the next token is at
    p + max(rows, columns): so many positions fewer than tokens, which the cache remembers for the tokens to come.

          a  b  image of 2 x 3     c
          0  1  2  2  2  2  2  2   5   time
          0  1  2  2  2  3  3  3   5   row
          0  1  2  3  4  2  3  4   5   column
    """
    device, flat = is_placeholder.device, is_placeholder.flatten()
    sizes = torch.tensor([rows * columns for rows, columns in shapes], device=device)
    columns = torch.tensor([columns for _, columns in shapes], device=device)
    extents = torch.tensor([max(shape) for shape in shapes], device=device)
    image = torch.arange(len(shapes), device=device).repeat_interleave(sizes)
    place = torch.arange(len(image), device=device) - (sizes.cumsum(0) - sizes)[image]
    shift = torch.zeros_like(flat, dtype=torch.int64)
    shift[flat] = torch.where(place == sizes[image] - 1, (extents - sizes)[image], 0)
    shift = shift.view_as(is_placeholder)
    known = 0 if scope.cache is None or scope.cache.rope_deltas is None else scope.cache.rope_deltas
    axes = (scope.position_ids.expand_as(is_placeholder) + known + shift.cumsum(dim=1) - shift).repeat(3, 1, 1)
    axes[:, is_placeholder] += torch.stack((0 * place, place // columns[image], place % columns[image])) - place
    if scope.cache is not None:
        scope.cache.rope_deltas = known + shift.sum(dim=1, keepdim=True)
    return scope.with_axis_positions(axes)


class VisionLanguageModel(nn.Module):
    """`model(input_ids (B,T), scope=None, image_features=None) -> logits (B,T,V)`: a decoder that may be given what an
    image encoder saw.

    image_features: `model.get_image_features(images)`, one vector for each placeholder of this pass, in reading order
    over the batch. Without images it is a decoder as any other. unused: modules of the tower that no logit depends on
    (LLaVA: the last blocks and the norm); they are never trained."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        tower: nn.Module,
        adapter: nn.Module,
        decoder: Decoder,
        encode: Encode,
        image_scope: ImageScope = causal_images,
        unused: Sequence[str] = (),
    ):
        super().__init__()
        self.spec = spec
        self.tower = tower
        self.adapter = adapter
        self.decoder = decoder
        self.encode = encode
        self.image_scope = image_scope
        self.unused = tuple(unused)
        self.generation_config: GenerationConfig | None = None
        for name in self.unused:
            self.get_submodule(name).requires_grad_(False)

    @property
    def config(self) -> Any:
        """The numbers this model was assembled from."""
        return self.spec.config

    @property
    def head(self) -> nn.Module:
        """The decoder's."""
        return self.decoder.head

    def get_image_features(self, images: Float[Tensor, "M C H W"]) -> Float[Tensor, "M *shape D"]:
        """Each image as the decoder's vectors: (M,N,D), or (M,rows,columns,D) where their grid matters."""
        return self.adapter(self.encode(self.tower, images))

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        scope: Scope | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "B T V"]:
        return self.head(self.hidden_states(input_ids, scope, image_features))

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        scope: Scope | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the head reads. image_features: (M,...,D), or one (...,D) for each image where they are of several
        sizes. UsageError where placeholders and vectors are not as many."""
        scope = Scope.unpadded(input_ids) if scope is None else scope
        if image_features is None:
            return self.decoder.hidden_states(input_ids, scope)
        vectors = torch.cat([part.flatten(0, -2) for part in image_feature_list(image_features)])
        is_placeholder = (input_ids == self.config.image_token_id) & (scope.position_ids >= 0)
        if not torch.compiler.is_compiling() and int(is_placeholder.sum()) != vectors.shape[0]:
            raise UsageError(
                f"tokens hold {int(is_placeholder.sum())} placeholders (image_token {self.config.image_token_id}), "
                f"but the images give {vectors.shape[0]} vectors: write a placeholder for each vector of every image"
            )
        embeds = self.decoder.embed.embed_tokens(input_ids)  # type: ignore[operator]
        inputs_embeds = embeds.masked_scatter(is_placeholder[:, :, None], vectors.to(embeds.dtype))
        scope = self.image_scope(scope, is_placeholder, image_shapes(image_features))
        return self.decoder.hidden_states(input_ids, scope, inputs_embeds)

    def with_images(self, images: Sequence[Images]) -> ImagePromptModel:
        """This model with the images of every prompt in view, for `generate`: prompt b has a run of placeholders for
        each of images[b], which is (M,C,H,W), or a list of (C,H,W) of several sizes."""
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
        return not f"{name}.".startswith(tuple(f"{module}." for module in self.unused))


Images = Tensor | Sequence[Tensor]
"""Images of one shape (M,C,H,W), or one tensor (C,H,W) for each."""


def image_feature_list(image_features: Images) -> Sequence[Tensor]:
    return (image_features,) if isinstance(image_features, Tensor) else image_features


def image_shapes(image_features: Images) -> ImageShapes:
    """How the vectors of each image lie."""
    if isinstance(image_features, Tensor):
        return [tuple(image_features.shape[1:-1])] * len(image_features)
    return [tuple(part.shape[:-1]) for part in image_features]


class ImagePromptModel(nn.Module):
    """A VisionLanguageModel as a plain decoder whose prompts have images: what `generate` drives.

    The pass that reads prompts (more than one token) is given their images, by the numbers of its rows; the passes
    after it read text alone."""

    def __init__(self, model: VisionLanguageModel, images: Sequence[Images]):
        super().__init__()
        self.model = model
        self.images = [list(row) for row in images]
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
        scope = Scope.unpadded(input_ids) if scope is None else scope
        if scope.num_prompts != len(self.images):
            raise UsageError(
                f"this pass reads {scope.num_prompts} prompts, and images were given for {len(self.images)}: "
                "one list of images for each prompt (a window that slides would leave them behind: make the context "
                "long enough)"
            )
        images = [image for row in scope.rows for image in self.images[row]]
        if not images:
            return self.model.hidden_states(input_ids, scope)
        return self.model.hidden_states(input_ids, scope, self.read_images(images, input_ids.device))

    def read_images(self, images: Sequence[Tensor], device: torch.device) -> Images:
        """The features of these images: in one pass where they are of one size, else of each."""
        if len({image.shape for image in images}) == 1:
            return self.model.get_image_features(torch.stack(list(images)).to(device))
        return [self.model.get_image_features(image[None].to(device))[0] for image in images]
