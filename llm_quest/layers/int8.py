"""Weights as 8-bit integers with one scale per row: W ~ scale * q, |q| <= 127.

Decoding one token reads every weight once, and memory bandwidth is the limit: a quarter of float32's bytes gives up to
four times the tokens. Activations stay floats (weight-only): no calibration.

`int8_linear_reference` is the definition. `int8_linear_packed` is the same through PyTorch's kernel for few rows on a
CPU, which rounds x and the result to bfloat16; scales are bfloat16 numbers, so that they lose nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from jaxtyping import Int8 as Bytes
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.moe import ExpertActivation

MAX_KERNEL_ROWS = 8
"""Up to so many rows of x the kernel is faster than widening the matrix once."""
KERNEL_ALIGNMENT = 32
"""The kernel reads rows in pieces of its vectors' width and does not look where they end: in torch 2.13, a width
that is no multiple of 16 gives wrong numbers or ends the process."""


def quantize_rows(
    weight: Float[Tensor, "*stack out in"],
) -> tuple[Bytes[Tensor, "*stack out in"], Float[Tensor, "*stack out"]]:
    """q and scale of each row: the largest number of a row becomes 127 (up to the rounding of the scale)."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(dim=-1) / 127).clamp(min=1e-30).to(torch.bfloat16).to(weight.dtype)
    q = (wide / scale[..., None]).round().clamp(-127, 127).to(torch.int8)
    return q, scale


def int8_linear_reference(
    x: Float[Tensor, "N in"], q: Bytes[Tensor, "out in"], scale: Float[Tensor, " out"]
) -> Float[Tensor, "N out"]:
    """The definition."""
    return F.linear(x, q.to(x.dtype)) * scale.to(x.dtype)


def int8_linear_packed(
    x: Float[Tensor, "N in"], q: Bytes[Tensor, "out in"], scale: Float[Tensor, " out"]
) -> Float[Tensor, "N out"]:
    """The same in bfloat16, without widening the matrix. The rows are a multiple of LANES."""
    assert q.shape[1] % KERNEL_ALIGNMENT == 0, "the kernel would read beyond the rows"
    half = torch.bfloat16
    return torch.ops.aten._weight_int8pack_mm(x.to(half), q, scale.to(half)).to(x.dtype)


def int8_linear(x: Float[Tensor, "*batch in"], q: Bytes[Tensor, "out in"], scale: Float[Tensor, " out"]) -> Tensor:
    """x W^T, in the faster form for this number of rows; float64, which tests use, takes the definition."""
    flat = x.reshape(-1, x.shape[-1])
    few = flat.shape[0] <= MAX_KERNEL_ROWS and x.dtype != torch.float64
    fits = x.device.type == "cpu" and q.shape[1] % KERNEL_ALIGNMENT == 0 and q.is_contiguous()
    return (int8_linear_packed if few and fits else int8_linear_reference)(flat, q, scale).view(
        *x.shape[:-1], q.shape[0]
    )


class Int8Matrix(nn.Module):
    """A matrix (out,in), or a stack of them. Both tensors are parameters, so that they are saved and loaded like any
    other; neither is trained."""

    def __init__(self, weight: Float[Tensor, "*stack out in"]):
        super().__init__()
        q, scale = quantize_rows(weight) if weight.device.type != "meta" else empty_int8(weight)
        self.q = nn.Parameter(q, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return int8_linear(x, self.q, self.scale)

    @property
    def weight(self) -> Float[Tensor, "*stack out in"]:
        """The matrix as floats."""
        return self.q.to(self.scale.dtype) * self.scale[..., None]


def empty_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[:-1])


class Int8Linear(nn.Module):
    """Replaces a linear layer. softcap: of a head whose logits are capped."""

    def __init__(self, matrix: Int8Matrix, bias: nn.Parameter | None, softcap: float | None = None):
        super().__init__()
        self.matrix, self.bias, self.softcap = matrix, bias, softcap

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.matrix(x)
        y = y if self.bias is None else y + self.bias
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        return self.matrix.weight


class Int8PackedLinear(nn.Module):
    """Replaces a `PackedLinear`."""

    def __init__(self, matrix: Int8Matrix, bias: nn.Parameter | None, parts: Mapping[str, int]):
        super().__init__()
        self.matrix, self.bias, self.parts = matrix, bias, dict(parts)

    def forward(self, x: Float[Tensor, "*batch in"]) -> tuple[Tensor, ...]:
        y = self.matrix(x)
        return (y if self.bias is None else y + self.bias).split(list(self.parts.values()), dim=-1)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        return self.matrix.weight


class Int8Embedding(nn.Module):
    """Replaces an embedding that a head is tied to: one matrix, whose rows are looked up."""

    def __init__(self, matrix: Int8Matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        rows = self.matrix.q[input_ids].to(self.matrix.scale.dtype)
        return rows * self.matrix.scale[input_ids][..., None]

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        return self.matrix.weight


class Int8Experts(nn.Module):
    """Replaces experts: each runs on its tokens, and those without tokens are not read."""

    def __init__(self, gate_up: Int8Matrix, down: Int8Matrix, expert_activation: ExpertActivation):
        super().__init__()
        self.gate_up, self.down, self.expert_activation = gate_up, down, expert_activation

    def forward(self, x: Float[Tensor, "N D"], topk_ids: Tensor, topk_weights: Tensor) -> Float[Tensor, "N D"]:
        out = torch.zeros_like(x)
        for expert in range(self.down.q.shape[0]):
            token, slot = torch.where(topk_ids == expert)
            if not token.numel():
                continue
            h = self.expert_activation(int8_linear(x[token], self.gate_up.q[expert], self.gate_up.scale[expert]))
            y = int8_linear(h, self.down.q[expert], self.down.scale[expert])
            out = out.index_add(0, token, (y * topk_weights[token, slot, None].to(y.dtype)).to(out.dtype))
        return out
