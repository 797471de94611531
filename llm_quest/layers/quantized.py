"""Layers with quantized weights (`layers/weight_formats.py`): they replace linear layers, embeddings and experts.

Decoding one token reads every weight once, and memory bandwidth is the limit: a quarter of float32's bytes (int8), or
an eighth (int4, nf4), gives up to so many times the tokens. Activations stay floats: no calibration, and a row's result
does not depend on the rows beside it.

Commonly got wrong: the bias of a quantized layer and the soft cap of a quantized head still have to be applied; only
the matrix is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.experts import ExpertBiases, Experts
from llm_quest.layers.linear import find_row_slice, softcap_logits
from llm_quest.layers.quantized_kernels import quantized_linear
from llm_quest.layers.weight_formats import WeightFormat, dequantize, quantize


class QuantizedMatrix(nn.Module):
    """A matrix (out,in), or a stack of them. Codes and scales are parameters, so that they are saved and loaded like
    any other; neither is trained."""

    def __init__(self, weight: Float[Tensor, "*stack out in"], form: WeightFormat):
        super().__init__()
        q, scale = quantize(weight, form)
        self.form, self.width = form, weight.shape[-1]
        self.floats: Tensor | None = None
        self.q = nn.Parameter(q, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.floats is not None and self.floats.dtype == x.dtype:
            return F.linear(x, self.floats)
        return quantized_linear(x, self.q, self.scale, self.form)

    def keep_floats(self) -> None:
        """Dequantize the matrix once, and multiply with the floats until it is moved, cast or loaded anew: for a
        machine whose kernel is slower than float32. Codes and scales stay what is saved."""
        self.floats = self.weight.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.floats = None
        return super()._apply(fn, recurse)

    def multiply_one(self, x: Float[Tensor, "N in"], index: int) -> Float[Tensor, "N out"]:
        """x times one matrix of a stack."""
        return quantized_linear(x, self.q[index], self.scale[index], self.form)

    def rows(self, index: Tensor) -> Float[Tensor, "*index in"]:
        """Some rows of the matrix as floats."""
        return dequantize(self.q[index], self.scale[index], self.form, self.width)

    @property
    def weight(self) -> Float[Tensor, "*stack out in"]:
        """The matrix as floats."""
        return dequantize(self.q, self.scale, self.form, self.width)


class QuantizedLinear(nn.Module):
    """Replaces a linear layer. softcap: of a head whose logits are capped."""

    def __init__(self, matrix: QuantizedMatrix, bias: nn.Parameter | None, softcap: float | None = None):
        super().__init__()
        self.matrix, self.bias, self.softcap = matrix, bias, softcap

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.matrix(x)
        y = y if self.bias is None else y + self.bias
        return softcap_logits(y, self.softcap)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        return self.matrix.weight


class QuantizedPackedLinear(nn.Module):
    """Replaces a `PackedLinear`."""

    def __init__(self, matrix: QuantizedMatrix, bias: nn.Parameter | None, parts: Mapping[str, int]):
        super().__init__()
        self.matrix, self.bias, self.parts = matrix, bias, dict(parts)

    def forward(self, x: Float[Tensor, "*batch in"]) -> tuple[Tensor, ...]:
        y = self.matrix(x)
        return (y if self.bias is None else y + self.bias).split(list(self.parts.values()), dim=-1)

    def row_slice(self, name: str) -> slice:
        """The rows of one part."""
        return find_row_slice(self.parts, name)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        return self.matrix.weight


class QuantizedEmbedding(nn.Module):
    """Replaces an embedding that a head is tied to: one matrix, whose rows are looked up."""

    def __init__(self, matrix: QuantizedMatrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.matrix.rows(input_ids)

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        return self.matrix.weight


class QuantizedExperts(nn.Module):
    """Replaces experts: each runs on its tokens, and those without tokens are not read. Compiled code, whose shapes
    are constant, reads all of them."""

    def __init__(self, gate_up: QuantizedMatrix, down: QuantizedMatrix, base: Experts):
        """base: the experts in floats, whose biases and activation stay."""
        super().__init__()
        self.gate_up, self.down, self.expert_activation = gate_up, down, base.expert_activation
        self.gate_up_bias, self.down_bias = base.gate_up_bias, base.down_bias

    def forward(self, x: Float[Tensor, "N D"], topk_ids: Tensor, topk_weights: Tensor) -> Float[Tensor, "N D"]:
        if torch.compiler.is_compiling():
            return self.run_all(x, topk_ids, topk_weights)
        out = torch.zeros_like(x)
        for expert in range(self.down.q.shape[0]):
            token, slot = torch.where(topk_ids == expert)
            if not token.numel():
                continue
            y = self.run_one(x[token], expert)
            out = out.index_add(0, token, (y * topk_weights[token, slot, None].to(y.dtype)).to(out.dtype))
        return out

    def run_all(self, x: Float[Tensor, "N D"], topk_ids: Tensor, topk_weights: Tensor) -> Float[Tensor, "N D"]:
        """Every expert on every token, with weight zero where it was not chosen."""
        out = torch.zeros_like(x)
        for expert in range(self.down.q.shape[0]):
            weights = torch.where(topk_ids == expert, topk_weights, 0.0).sum(dim=-1, keepdim=True)
            y = self.run_one(x, expert)
            out = out + (y * weights.to(y.dtype)).to(out.dtype)
        return out

    def run_one(self, x: Float[Tensor, "N D"], expert: int) -> Float[Tensor, "N D"]:
        """One expert on these tokens."""
        h = self.gate_up.multiply_one(x, expert)
        if self.biases is None:
            return self.down.multiply_one(self.expert_activation(h), expert)
        h = self.expert_activation(h + self.biases.gate_up[expert])
        return self.down.multiply_one(h, expert) + self.biases.down[expert]

    @property
    def biases(self) -> ExpertBiases | None:
        if self.gate_up_bias is None or self.down_bias is None:
            return None
        return ExpertBiases(self.gate_up_bias, self.down_bias)
