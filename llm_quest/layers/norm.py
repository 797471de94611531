"""Normalization. Computed in float32 (float64 stays what it is) and returned in the dtype that came in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers import training_kernels


class Identity(nn.Identity):
    """nn.Identity whose call is its forward alone, so that no hook sees it: a module's call costs as much as a small
    operator, and a token has seven in each layer of a Llama that do nothing."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


class ConstantScale(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x * self.factor


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    Commonly got wrong: eps belongs inside the root; the cast back to the input's dtype comes *before* the product with
    the weight (it matters in bfloat16)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        dtype = x.dtype
        weight: Tensor = self.weight
        if training_kernels.takes_training_kernel(x, weight):
            return training_kernels.rms_norm_by_kernel(x, weight, self.eps)
        weight = weight if weight.dtype == dtype else weight.to(dtype)
        if dtype in (torch.float32, torch.float64):
            return torch.rms_norm(x, x.shape[-1:], weight, self.eps)
        return torch.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(dtype) * weight


class ScaledNorm(nn.Module):
    """norm(x) times a constant: the final norm of a model whose logits are scaled. The head is linear, so the factor
    may stand before it, where every loss that reads the head's matrix finds it."""

    def __init__(self, base: nn.Module, factor: float):
        super().__init__()
        self.base = base
        self.factor = factor

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.base(x) * self.factor  # type: ignore[no-any-return]


class AcrossHeads(nn.Module):
    """A norm over all heads of a token together, (B,T,H,d) seen as (B,T,H d): in OLMo 2's queries and keys the mean
    square runs over the whole projection, and so does the weight."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Float[Tensor, "B T H d"]) -> Float[Tensor, "B T H d"]:
        return self.norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])  # type: ignore[no-any-return]


class Clamp(nn.Module):
    """x limited to [-limit, limit], number by number: OLMoE's queries, keys and values (its `clip_qkv`)."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit = limit

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x.clamp(-self.limit, self.limit)


class ZeroCenteredRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), the norm of Gemma and Qwen3-Next: the weight is centered at 0.

    Commonly got wrong: here the product with 1 + weight is taken in float32, *before* the cast back."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], 1 + self.weight.to(wide), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, biased variance (Ba et al. 2016, arXiv:1607.06450, eq. 3, 4).

    bias: False for a norm without one (Cohere). Commonly got wrong: (x - mean) / (std + eps) is another function."""

    def __init__(self, dim: int, eps: float, *, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        fine = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(fine), None if self.bias is None else self.bias.to(fine)
        return F.layer_norm(x.to(fine), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


class PerHeadLayerNorm(nn.Module):
    """LayerNorm of each head with a weight of its own and no bias (StableLM 2): x (B,T,H,d), weight (H d)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, eps
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))

    def forward(self, x: Float[Tensor, "B T H d"]) -> Float[Tensor, "B T H d"]:
        fine = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(fine), x.shape[-1:], None, None, self.eps)
        return (normed * self.weight.to(fine).view(self.num_heads, self.head_dim)).to(x.dtype)

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.weight)


class DynamicTanh(nn.Module):
    """y = weight * tanh(alpha x) + bias (DyT, Zhu et al. 2025, arXiv:2503.10622, section 4), in a norm's place: one
    learned scalar alpha, and no number of a token depends on another. alpha_init: alpha's first value."""

    def __init__(self, dim: int, alpha_init: float, *, bias: bool):
        super().__init__()
        self.alpha_init = alpha_init
        self.alpha = nn.Parameter(torch.full((), alpha_init))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (x.to(wide) * self.alpha.to(wide)).tanh() * self.weight.to(wide)
        return (y if self.bias is None else y + self.bias.to(wide)).to(x.dtype)

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
