"""Patch embeddings: an image is cut into squares, and each square is a token (Dosovitskiy et al. 2021,
arXiv:2010.11929). Projectors: from an image encoder's vectors to a language model's.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.errors import UsageError
from llm_quest.layers.norm import LayerNorm, ZeroCenteredRMSNorm


class PatchEmbedding(nn.Linear):
    """Cut (B,C,H,W) into squares of side P, row by row, and project the C P P numbers of each: (B,N,D), N = (H/P)(W/P).

    The same as a convolution of kernel and stride P whose weight (D,C,P,P) is laid out as (D, C P P)."""

    def __init__(self, num_channels: int, patch_size: int, dim: int, *, bias: bool = True):
        super().__init__(num_channels * patch_size * patch_size, dim, bias=bias)
        self.num_channels, self.patch_size = num_channels, patch_size

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        batch, channels, height, width = images.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        cut = images.reshape(batch, channels, rows, self.patch_size, columns, self.patch_size)
        return super().forward(cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1))


class ImageEmbedding(nn.Module):
    """[class token; patches] + positions: a learned class token before the patches, and a learned position for each of
    them, the class token included (eq. 1). image_size: side of the square images.

    Raises UsageError for images of another shape: the positions belong to one grid (`interpolate_pos_encoding` makes
    those of another)."""

    def __init__(
        self, image_size: int, patch_size: int, num_channels: int, dim: int, *, bias: bool = True, dropout: float = 0.0
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"images of {image_size} x {image_size} cannot be cut into patches of {patch_size}: make patch_size "
                "divide image_size"
            )
        self.image_size = image_size
        self.patches = PatchEmbedding(num_channels, patch_size, dim, bias=bias)
        self.start = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.zeros((image_size // patch_size) ** 2 + 1, dim))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B T D"]:
        require_image_shape(images, self.patches.num_channels, self.image_size)
        x = self.patches(images.to(self.start.dtype))
        start = self.start.to(x.dtype).expand(x.shape[0], 1, -1)
        return self.dropout(torch.cat((start, x), dim=1) + self.positions)

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Class token and positions N(0, 0.02^2)."""
        nn.init.normal_(self.start, std=0.02, generator=generator)
        nn.init.normal_(self.positions, std=0.02, generator=generator)


class PatchPositionEmbedding(nn.Module):
    """Patches + a learned position for each of them, without a class token (SigLIP). image_size: side of the square
    images. Raises UsageError for images of another shape."""

    def __init__(self, image_size: int, patch_size: int, num_channels: int, dim: int):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"images of {image_size} x {image_size} cannot be cut into patches of {patch_size}: make patch_size "
                "divide image_size"
            )
        self.image_size = image_size
        self.patches = PatchEmbedding(num_channels, patch_size, dim)
        self.positions = nn.Parameter(torch.zeros((image_size // patch_size) ** 2, dim))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        require_image_shape(images, self.patches.num_channels, self.image_size)
        return self.patches(images.to(self.positions.dtype)) + self.positions

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Positions N(0, 1/D)."""
        nn.init.normal_(self.positions, std=self.positions.shape[1] ** -0.5, generator=generator)


def require_image_shape(images: Tensor, num_channels: int, image_size: int) -> None:
    """UsageError for images (B,C,H,W) of another shape than a model reads."""
    expected = (num_channels, image_size, image_size)
    if tuple(images.shape[1:]) != expected:
        raise UsageError(
            f"images are {' x '.join(map(str, images.shape[1:]))}; "
            f"this model reads {' x '.join(map(str, expected))} "
            "(channels, height, width): resize them, or the model's positions"
        )


def interpolate_pos_encoding(positions: Float[Tensor, "T D"], grid_size: int) -> Float[Tensor, "S D"]:
    """The positions of a `side` x `side` grid, from those of another square grid; the class token's stays. "2D
    interpolation" (section 3.2) is bicubic in transformers and timm, as here; the paper's own code has it linear.

    Commonly got wrong: taking the first side^2 rows, which are other places of the image for all but the first row."""
    first, grid = positions[:1], positions[1:].float()
    old = round(grid.shape[0] ** 0.5)
    picture = grid.T.reshape(1, -1, old, old)
    turned = F.interpolate(picture, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return torch.cat((first, turned.flatten(2)[0].T.to(first.dtype)))


class LinearProjector(nn.Module):
    """out(x): one matrix (LLaVA's first version, Liu et al. 2023, arXiv:2304.08485)."""

    def __init__(self, dim: int, out_dim: int, *, bias: bool = True):
        super().__init__()
        self.out = nn.Linear(dim, out_dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch W"]:
        return self.out(x)


class MLPProjector(nn.Module):
    """out(GELU(up(x))), the hidden layer as wide as the output (LLaVA-1.5, Liu et al. 2024, arXiv:2310.03744). GELU by
    erf."""

    def __init__(self, dim: int, out_dim: int, *, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(dim, out_dim, bias=bias)
        self.out = nn.Linear(out_dim, out_dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch W"]:
        return self.out(F.gelu(self.up(x)))


class PooledProjector(nn.Module):
    """out(norm(pool(x))): the patches (B,N,D) of a square are averaged in squares until `num_tokens` are left, then
    normalized and projected (Gemma 3, arXiv:2503.19786, section 2.1).

    Commonly got wrong: this norm scales by 1 + weight, as the language model's do, with the image encoder's eps."""

    def __init__(self, dim: int, out_dim: int, *, num_patches: int, num_tokens: int, eps: float):
        super().__init__()
        self.patches_per_side, side = math.isqrt(num_patches), math.isqrt(num_tokens)
        if side**2 != num_tokens or side > self.patches_per_side or self.patches_per_side % side:
            raise ValueError(
                f"{num_patches} patches cannot be averaged into mm_tokens_per_image={num_tokens}: make it a square "
                f"whose side divides {self.patches_per_side}"
            )
        self.pool = nn.AvgPool2d(self.patches_per_side // side)
        self.norm = ZeroCenteredRMSNorm(dim, eps)
        self.out = nn.Linear(dim, out_dim, bias=False)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B K W"]:
        picture = x.mT.unflatten(-1, (self.patches_per_side, self.patches_per_side))
        return self.out(self.norm(self.pool(picture).flatten(2).mT))


class PatchGridEmbedding(nn.Module):
    """Patches of images of any size + learned positions of a square grid, interpolated to the image's own
    (Qwen3-VL, Qwen3.5): bilinear, the corners of both grids lying on each other. A patch holds `temporal_patch_size`
    frames, and an image is as many equal ones. factor: what both sides of an image must be multiples of."""

    def __init__(
        self, num_positions: int, patch_size: int, num_channels: int, dim: int, *, temporal_patch_size: int, factor: int
    ):
        super().__init__()
        self.grid_side, self.factor, self.temporal_patch_size = math.isqrt(num_positions), factor, temporal_patch_size
        self.patches = PatchEmbedding(num_channels * temporal_patch_size, patch_size, dim)
        self.positions = nn.Parameter(torch.zeros(num_positions, dim))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        channels, height, width = images.shape[1:]
        expected = self.patches.num_channels // self.temporal_patch_size
        if channels != expected or height % self.factor or width % self.factor:
            raise UsageError(
                f"images are {channels} x {height} x {width}; this model reads {expected} channels and sides that are "
                f"multiples of {self.factor}: resize them"
            )
        frames = images.to(self.positions.dtype).repeat_interleave(self.temporal_patch_size, dim=1)
        rows, columns = (side // self.patches.patch_size for side in (height, width))
        return self.patches(frames) + self.interpolate_positions(rows, columns)

    def interpolate_positions(self, rows: int, columns: int) -> Float[Tensor, "N D"]:
        """The positions of a grid of rows x columns."""
        grid = self.positions.T.unflatten(1, (self.grid_side, self.grid_side))[None]
        return F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=True)[0].flatten(1).T

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Positions N(0, 0.02^2)."""
        nn.init.normal_(self.positions, std=0.02, generator=generator)


class PatchMerger(nn.Module):
    """out(GELU(up(four neighbors, each normalized))): a vector for each square of merge_size x merge_size patches
    (Qwen2-VL, arXiv:2409.12191): (B,R,C,D) -> (B,R/2,C/2,W). GELU by erf."""

    def __init__(self, dim: int, out_dim: int, merge_size: int, eps: float = 1e-6):
        super().__init__()
        self.merge_size = merge_size
        self.norm = LayerNorm(dim, eps)
        self.up = nn.Linear(dim * merge_size**2, dim * merge_size**2)
        self.out = nn.Linear(dim * merge_size**2, out_dim)

    def forward(self, x: Float[Tensor, "B R C D"]) -> Float[Tensor, "B r c W"]:
        blocks = self.norm(x).unflatten(2, (-1, self.merge_size)).unflatten(1, (-1, self.merge_size))
        joined = blocks.transpose(2, 3).flatten(3)
        return self.out(F.gelu(self.up(joined)))
