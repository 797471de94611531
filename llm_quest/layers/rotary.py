"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the published ways to stretch it beyond the trained
length.

Pair i of a head, (x_i, x_{i+d/2}), is turned by the angle position * f_i with f_i = theta^(-2i/d): the product of a
rotated query and a rotated key then depends on the distance of their positions only.

Commonly got wrong: Meta's and DeepSeek's own files rotate neighbours (2i, 2i+1); Hugging Face's weights were permuted
so that the half-split pairs used here give the same products. Angles are computed in float32: in bfloat16 they lose
whole turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.scope import Scope


class Scaling(Protocol):
    """A stretch of the frequencies; `attention_factor` multiplies cos and sin (so the scores by its square)."""

    @property
    def attention_factor(self) -> float: ...

    def frequencies(self, width: int, theta: float) -> Float[Tensor, " pairs"]: ...


def plain_frequencies(width: int, theta: float) -> Float[Tensor, " pairs"]:
    """f_i = theta^(-2i/width), i = 0 .. width/2 - 1, in float32 and on the host."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)


@dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al., arXiv:2306.15595): every frequency divided by `factor`."""

    factor: float
    attention_factor: float = 1.0

    def frequencies(self, width: int, theta: float) -> Float[Tensor, " pairs"]:
        return plain_frequencies(width, theta) / self.factor


@dataclass(frozen=True)
class NTK:
    """NTK-aware (bloc97 2023): a larger base, theta * factor^(d/(d-2)). The lowest frequency is divided by exactly
    `factor`, the highest stays."""

    factor: float
    attention_factor: float = 1.0

    def frequencies(self, width: int, theta: float) -> Float[Tensor, " pairs"]:
        return plain_frequencies(width, theta * self.factor ** (width / (width - 2)))


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's rule: wavelengths longer than original/low are stretched by `factor`, shorter than original/high are
    kept, those between are blended."""

    factor: float
    low: float
    high: float
    original: int
    attention_factor: float = 1.0

    def frequencies(self, width: int, theta: float) -> Float[Tensor, " pairs"]:
        f = plain_frequencies(width, theta)
        wavelength = 2 * math.pi / f
        blend = (self.original / wavelength - self.low) / (self.high - self.low)
        between = (1 - blend) * f / self.factor + blend * f
        stretched = torch.where(wavelength > self.original / self.low, f / self.factor, f)
        middle = (wavelength >= self.original / self.high) & (wavelength <= self.original / self.low)
        return torch.where(middle, between, stretched)


@dataclass(frozen=True)
class YaRN:
    """YaRN (Peng et al., arXiv:2309.00071): pairs that turn more than `fast` times within the original length are kept,
    those that turn less than `slow` times are interpolated, a ramp between; and attention is sharpened by a
    temperature.

    Commonly got wrong: it acts on the *original* base; the temperature 0.1 ln s + 1 multiplies cos and sin, so the
    scores by its square. mscale, mscale_all_dim: DeepSeek's variant of that factor. truncate False keeps the ramp's
    ends fractional."""

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    explicit_factor: float | None = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        if self.explicit_factor is not None:
            return self.explicit_factor
        if self.mscale and self.mscale_all_dim:
            return temperature(self.factor, self.mscale) / temperature(self.factor, self.mscale_all_dim)
        return temperature(self.factor, 1.0)

    def frequencies(self, width: int, theta: float) -> Float[Tensor, " pairs"]:
        low, high = (self.pair_turning(turns, width, theta) for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high
        ramp = ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
        f = plain_frequencies(width, theta)
        return f / self.factor * ramp + f * (1 - ramp)

    def pair_turning(self, turns: float, width: int, theta: float) -> float:
        """The (fractional) pair that makes so many turns within the original length."""
        return width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def temperature(factor: float, mscale: float) -> float:
    """m(s, a) = 0.1 a ln s + 1, and 1 for s <= 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class Rotary:
    """Rotates the first `width` numbers of each head (B,T,H,d); the rest passes. One object may serve many layers.

    interleaved: the pairs are neighbours (2i, 2i+1) in the weights' order (DeepSeek); they come out half-split, which
    changes no product as long as queries and keys do the same."""

    width: int
    theta: float
    scaling: Scaling | None = None
    interleaved: bool = False
    frequencies: tuple[float, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.width % 2 or self.width <= 0:
            raise ValueError(f"rotary width {self.width} is not a positive even number: pairs of numbers are rotated")
        scaled = self.scaling.frequencies if self.scaling else plain_frequencies
        object.__setattr__(self, "frequencies", tuple(scaled(self.width, self.theta).tolist()))

    def __call__(self, x: Float[Tensor, "B T H d"], scope: Scope) -> Float[Tensor, "B T H d"]:
        cos, sin = scope.once((self, x.dtype), lambda: self.tables(scope, x.dtype))
        if self.interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        if self.width == x.shape[-1]:
            return rotate(x, cos, sin)
        return torch.cat((rotate(x[..., : self.width], cos, sin), x[..., self.width :]), dim=-1)

    def tables(self, scope: Scope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B,T,1,pairs), computed in float32; one row serves all where every row stands at the same
        positions."""
        positions = scope.positions[:1] if scope.is_plain else scope.positions
        f = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        angles = positions[..., None, None].float() * f
        factor = self.scaling.attention_factor if self.scaling else 1.0
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Float[Tensor, "B T H d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H d"]:
    """Half-split pairs: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class NoRotary:
    """Leaves queries and keys as they are: for models whose positions are added to the embedding."""

    def __call__(self, x: Tensor, scope: Scope) -> Tensor:
        return x
