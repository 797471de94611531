"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the published ways to extend it beyond the trained length.

Pair i of a head, (x_i, x_{i+d/2}), is rotated by the angle position * f_i with f_i = theta^(-2i/d): the product of a
rotated query and a rotated key then depends on the distance of their positions only.

Commonly got wrong: Meta's and DeepSeek's own files rotate neighbors (2i, 2i+1); Hugging Face's weights were permuted
so that the half-split pairs used here give the same products. Angles are computed in float32: in bfloat16 they lose
whole turns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from llm_quest.layers import training_kernels
from llm_quest.scope import Scope


class RopeScaling(Hashable, Protocol):
    """A scaling of the frequencies; `attention_factor` multiplies cos and sin (so the scores by its square)."""

    @property
    def attention_factor(self) -> float: ...

    def inv_freq(self, dim: int, theta: float) -> Float[Tensor, " pairs"]: ...


def default_inv_freq(dim: int, theta: float) -> Float[Tensor, " pairs"]:
    """f_i = theta^(-2i/dim), i = 0 .. dim/2 - 1, in float32 and on the host."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., arXiv:2306.15595): every frequency divided by `factor`."""

    factor: float
    attention_factor: float = 1.0

    def inv_freq(self, dim: int, theta: float) -> Float[Tensor, " pairs"]:
        return default_inv_freq(dim, theta) / self.factor


@dataclass(frozen=True)
class NTKScaling:
    """NTK-aware (bloc97 2023): a larger base, theta * factor^(d/(d-2)). The lowest frequency is divided by exactly
    `factor`, the highest stays."""

    factor: float
    attention_factor: float = 1.0

    def inv_freq(self, dim: int, theta: float) -> Float[Tensor, " pairs"]:
        return default_inv_freq(dim, theta * self.factor ** (dim / (dim - 2)))


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rule: wavelengths longer than original/low are stretched by `factor`, those shorter than
    original/high stay, those between are interpolated."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0

    def inv_freq(self, dim: int, theta: float) -> Float[Tensor, " pairs"]:
        f = default_inv_freq(dim, theta)
        wavelength = 2 * math.pi / f
        blend = (self.original_max_position_embeddings / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - blend) * f / self.factor + blend * f
        stretched = torch.where(
            wavelength > self.original_max_position_embeddings / self.low_freq_factor, f / self.factor, f
        )
        middle = (wavelength >= self.original_max_position_embeddings / self.high_freq_factor) & (
            wavelength <= self.original_max_position_embeddings / self.low_freq_factor
        )
        return torch.where(middle, between, stretched)


@dataclass(frozen=True)
class YaRNScaling:
    """YaRN (Peng et al., arXiv:2309.00071): pairs that turn more than `beta_fast` times within the original length
    stay, those that turn less than `beta_slow` times are interpolated, a ramp between; and attention is sharpened by a
    temperature.

    Commonly got wrong: it acts on the *original* base; the temperature 0.1 ln s + 1 multiplies cos and sin, so the
    scores by its square. mscale, mscale_all_dim: DeepSeek's variant of that factor. truncate False keeps the ramp's
    ends fractional.

    Differs: the ramp is linear in the pair's index, as in the authors' released code and every published model; in the
    paper it is linear in the number of turns, original / wavelength (`yarn_by_wavelength`)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    explicit_attention_factor: float | None = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        if self.explicit_attention_factor is not None:
            return self.explicit_attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def inv_freq(self, dim: int, theta: float) -> Float[Tensor, " pairs"]:
        low, high = (self.find_correction_dim(turns, dim, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high
        ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
        f = default_inv_freq(dim, theta)
        return f / self.factor * ramp + f * (1 - ramp)

    def find_correction_dim(self, num_rotations: float, dim: int, theta: float) -> float:
        """The (fractional) pair that makes this many turns within the original length."""
        return (
            dim
            * math.log(self.original_max_position_embeddings / (num_rotations * 2 * math.pi))
            / (2 * math.log(theta))
        )


def yarn_mscale(factor: float, mscale: float) -> float:
    """m(s, a) = 0.1 a ln s + 1, and 1 for s <= 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class LongRoPEScaling:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): every pair has a divisor of its own, found by search; one list for
    texts up to the original length, another for longer ones. attention_factor: sqrt(1 + ln s / ln original).

    Commonly got wrong: the list is chosen once for all positions of a text, not by each position; the attention factor
    belongs to the short list too, so that even a short prompt differs from plain rotation.

    Differs: keys in a cache keep the rotation that they were written with, so a text must not change its list while it
    grows. A cached pass takes the long list where its cache can hold more than the original length (as vLLM does);
    transformers' `generate` takes the short one first and reads everything again when the text crosses that length."""

    factor: float
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    explicit_attention_factor: float | None = None

    @property
    def attention_factor(self) -> float:
        if self.explicit_attention_factor is not None:
            return self.explicit_attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def inv_freq(self, dim: int, theta: float) -> Float[Tensor, " pairs"]:
        return self.divide(dim, theta, self.short_factor)

    def long_inv_freq(self, dim: int, theta: float) -> Float[Tensor, " pairs"]:
        """The frequencies of texts beyond the original length."""
        return self.divide(dim, theta, self.long_factor)

    def divide(self, dim: int, theta: float, divisors: tuple[float, ...]) -> Float[Tensor, " pairs"]:
        if len(divisors) != dim // 2:
            raise ValueError(
                f"longrope has {len(divisors)} factors for {dim // 2} rotated pairs; one for each is needed"
            )
        return default_inv_freq(dim, theta) / torch.tensor(divisors, dtype=torch.float32, device="cpu")

    def choose_inv_freq(self, short: Tensor, long: Tensor, scope: Scope, position_ids: Tensor) -> Tensor:
        """The list of each row (B,1,1,pairs): by its last position, or by what the cache can hold."""
        if scope.cache is not None:
            return long if scope.cache.capacity > self.original_max_position_embeddings else short
        reach = position_ids.amax(dim=1)[:, None, None, None] + 1
        return torch.where(reach > self.original_max_position_embeddings, long, short)


def yarn_by_wavelength(
    factor: float, original: int, dim: int, theta: float, *, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> LongRoPEScaling:
    """YaRN with the paper's ramp ("NTK-by-parts"): a pair that makes r = original / wavelength turns within the
    original length has the frequency (1 - gamma) f / s + gamma f, gamma = (r - beta_slow) / (beta_fast - beta_slow)
    within [0, 1].

    As a divisor for each pair, 1 / ((1 - gamma) / s + gamma), which is a form that every reader of configs computes."""
    turns = original * default_inv_freq(dim, theta).double() / (2 * math.pi)
    gamma = ((turns - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    divisors = tuple((1 / ((1 - gamma) / factor + gamma)).tolist())
    return LongRoPEScaling(factor, original, divisors, divisors, yarn_mscale(factor, 1.0))


@functools.lru_cache(maxsize=1024, typed=True)
def compute_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The frequencies of all pairs, and those of LongRoPE beyond the original length (the same where there is another
    scaling). Kept, because a config.json is read many times while a folder is validated. dtype: in which they are
    computed, so that those of `computing_in_float64` are kept apart."""
    with _disable_current_modes():  # while a plan counts FLOPs on fake tensors, which have no values
        scaled = scaling.inv_freq(dim, theta) if scaling else default_inv_freq(dim, theta)
        longer = scaling.long_inv_freq(dim, theta) if isinstance(scaling, LongRoPEScaling) else scaled
        return tuple(scaled.tolist()), tuple(longer.tolist())


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotates the first `dim` numbers of each head (B,T,H,d); the rest is unchanged. One object may serve many layers.

    interleaved: the pairs are neighbors (2i, 2i+1) in the weights' order (DeepSeek); the output is half-split, which
    changes no product as long as queries and keys do the same."""

    dim: int
    rope_theta: float
    scaling: RopeScaling | None = None
    interleaved: bool = False
    inv_freq: tuple[float, ...] = field(init=False, compare=False, repr=False)
    long_inv_freq: tuple[float, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.dim % 2 or self.dim <= 0:
            raise ValueError(f"rotary width {self.dim} is not a positive even number: pairs of numbers are rotated")
        dtype = torch.empty(0, dtype=torch.float32, device="cpu").dtype  # float64 inside of `computing_in_float64`
        frequencies, long_frequencies = compute_frequencies(self.dim, self.rope_theta, self.scaling, dtype)
        object.__setattr__(self, "inv_freq", frequencies)
        object.__setattr__(self, "long_inv_freq", long_frequencies)

    def __call__(self, x: Float[Tensor, "B T H d"], scope: Scope) -> Float[Tensor, "B T H d"]:
        cos, sin = scope.cached((self, x.dtype), lambda: widen_tables(*self.cos_sin(scope, x.dtype)))
        return self.rotate(x, cos, sin)

    def rotate(self, x: Float[Tensor, "B T H d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H d"]:
        """The first `dim` numbers of each head, rotated; the rest as it is. cos, sin: from `widen_tables`."""
        turned = x[..., : self.dim]
        if self.interleaved:
            turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned = apply_rotary_emb(turned, cos, sin)
        return turned if self.dim == x.shape[-1] else torch.cat((turned, x[..., self.dim :]), dim=-1)

    def cos_sin(self, scope: Scope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B,T,1,pairs), computed in float32; one row for all where all rows have the same positions."""
        position_ids = scope.position_ids[:1] if scope.is_unpadded else scope.position_ids
        return self.cos_sin_at(position_ids, scope, dtype)

    def cos_sin_at(self, position_ids: Tensor, scope: Scope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B,T,1,pairs) of these positions (B,T)."""
        f = torch.tensor(self.inv_freq, dtype=torch.float32, device=position_ids.device)
        if isinstance(self.scaling, LongRoPEScaling):
            f = self.scaling.choose_inv_freq(f, f.new_tensor(self.long_inv_freq), scope, position_ids)
        angles = position_ids[..., None, None].float() * f
        factor = self.scaling.attention_factor if self.scaling else 1.0
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def widen_tables(cos: Float[Tensor, "B T 1 pairs"], sin: Float[Tensor, "B T 1 pairs"]) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin), (B,T,1,d), which `apply_rotary_emb` multiplies with."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary_emb(x: Float[Tensor, "B T H d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H d"]:
    """Half-split pairs: (a, b) -> (a cos - b sin, b cos + a sin), as (a, b) (cos, cos) + (b, a) (-sin, sin): five
    operators in place of eight. cos, sin: from `widen_tables`."""
    if not cos.requires_grad and training_kernels.takes_training_kernel(x, cos, sin):
        return training_kernels.rotate_by_kernel(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((b, a), dim=-1) * sin


class NoRotary:
    """Leaves queries and keys unchanged: for models that add positions to the embedding, and for layers without any
    (NoPE)."""

    def __call__(self, x: Tensor, scope: Scope) -> Tensor:
        return x
