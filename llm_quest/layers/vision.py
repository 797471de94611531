"""Patch embeddings: an image is cut into squares, and each square is a token (Dosovitskiy et al. 2021,
arXiv:2010.11929). Projectors: from an image encoder's vectors to a language model's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.errors import UsageError


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
        expected = (self.patches.num_channels, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise UsageError(
                f"images are {' x '.join(map(str, images.shape[1:]))}; "
                f"this model reads {' x '.join(map(str, expected))} "
                "(channels, height, width): resize them, or the model's positions"
            )
        x = self.patches(images.to(self.start.dtype))
        start = self.start.to(x.dtype).expand(x.shape[0], 1, -1)
        return self.dropout(torch.cat((start, x), dim=1) + self.positions)

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Class token and positions N(0, 0.02^2)."""
        nn.init.normal_(self.start, std=0.02, generator=generator)
        nn.init.normal_(self.positions, std=0.02, generator=generator)


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
