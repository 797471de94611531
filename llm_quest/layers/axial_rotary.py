"""Rotary positions on several axes: rows and columns of an image's patches (`AxialRotary`), and time, row and column of
the tokens of images among text (`MultimodalRotary`, mRoPE). Both read `scope.axis_positions` (axes, B, T)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.layers.rotary import RotaryEmbedding, apply_rotary_emb, default_inv_freq, widen_tables
from llm_quest.scope import Scope


@dataclass(frozen=True)
class AxialRotary:
    """Rotates a head of d numbers by row and column: of its d/2 pairs (x_i, x_{i+d/2}) the first half turns with the
    row, the second with the column, both with the frequencies theta^(-4i/d) (Qwen2-VL, arXiv:2409.12191)."""

    head_dim: int
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.head_dim % 4:
            raise ValueError(f"heads of {self.head_dim} numbers have no equal pairs for rows and columns: use 4, 8, 12")

    def __call__(self, x: Float[Tensor, "B T H d"], scope: Scope) -> Float[Tensor, "B T H d"]:
        cos, sin = scope.cached((self, x.dtype), lambda: widen_tables(*self.cos_sin(scope, x.dtype)))
        return apply_rotary_emb(x, cos, sin)

    def cos_sin(self, scope: Scope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B,T,1,pairs), computed in float32."""
        assert scope.axis_positions is not None, "the image encoder gives rows and columns"
        f = default_inv_freq(self.head_dim // 2, self.rope_theta).to(scope.axis_positions.device)
        angles = scope.axis_positions[..., None].float() * f
        rows_and_columns = torch.cat(angles.unbind(0), dim=-1)[:, :, None]
        return rows_and_columns.cos().to(dtype), rows_and_columns.sin().to(dtype)


@dataclass(frozen=True)
class MultimodalRotary:
    """Rotary positions with three axes, interleaved (Qwen3-VL, Qwen3.5): pair i turns with the row if i % 3 is 1 and
    i < 3 mrope_section[1], with the column if i % 3 is 2 and i < 3 mrope_section[2], else with time. For text the three
    are one, and this is `base`.

    Behind an image positions are fewer than tokens (`three_axis_positions`); a cache remembers by how many.
    Commonly got wrong: Qwen2-VL's sections are blocks, not interleaved, and the two are not interchangeable."""

    base: RotaryEmbedding
    mrope_section: tuple[int, ...]

    def __call__(self, x: Float[Tensor, "B T H d"], scope: Scope) -> Float[Tensor, "B T H d"]:
        cos, sin = scope.cached((self, x.dtype), lambda: widen_tables(*self.cos_sin(scope, x.dtype)))
        return self.base.rotate(x, cos, sin)

    def cos_sin(self, scope: Scope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B,T,1,pairs)."""
        if scope.axis_positions is not None:
            axis = self.axis_of_pair(scope.axis_positions.device)
            (cos_t, sin_t), (cos_r, sin_r), (cos_c, sin_c) = (
                self.base.cos_sin_at(positions, scope, dtype) for positions in scope.axis_positions
            )
            cos = torch.where(axis == 2, cos_c, torch.where(axis == 1, cos_r, cos_t))
            return cos, torch.where(axis == 2, sin_c, torch.where(axis == 1, sin_r, sin_t))
        deltas = None if scope.cache is None else scope.cache.rope_deltas
        if deltas is None:
            return self.base.cos_sin(scope, dtype)
        return self.base.cos_sin_at(scope.position_ids + deltas, scope, dtype)

    def axis_of_pair(self, device: torch.device) -> Tensor:
        """(pairs,): 0 for time, 1 for the row, 2 for the column."""
        pairs = range(self.base.dim // 2)
        axes = [i % 3 if i % 3 and i < 3 * self.mrope_section[i % 3] else 0 for i in pairs]
        return torch.tensor(axes, device=device)
