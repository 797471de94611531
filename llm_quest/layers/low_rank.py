"""Low-rank edits of a matrix: W' = W + scale * B core(A), with A (r,in), B (out,r), and between them nothing (LoRA), a
square matrix (LoRA-XS) or a few mixed ones (TinyLoRA). W itself stays unchanged, as `base`.

A wrapper keeps the interface of what it wraps: `weight` is the effective matrix (MLA multiplies by it directly),
`parts` are the base's. `enabled` False: the model without its adapters, in the same memory.

Commonly got wrong: dropout is on the adapter's input, not on the base's; DoRA's norm is one number for each output (a
row of W), not for each input, and has no gradient; with an adapter off, `weight` is the base's too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.experts import Experts, fastest_backend
from llm_quest.layers.linear import PackedLinear
from llm_quest.layers.quantized import QuantizedExperts, QuantizedLinear, QuantizedMatrix, QuantizedPackedLinear


class LowRankUpdate(nn.Module):
    """The edit of one matrix (out,in), or of a stack of them (E,out,in). core: the module between A and B, which acts
    on the last dimension."""

    def __init__(
        self, A: nn.Parameter, B: nn.Parameter, *, scale: float, core: nn.Module | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.A, self.B, self.scale = A, B, scale
        self.core = core or nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self, x: Float[Tensor, "*batch in"], base_output: Float[Tensor, "*batch out"], weight: Callable[[], Tensor]
    ) -> Float[Tensor, "*batch out"]:
        """The edited output. base_output: W x. weight: gives W to an edit that needs it; a quantized one is then
        dequantized. Dropout acts on the adapter's x alone."""
        return base_output + self.update(self.dropout(x))

    def update(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(self.scale * self.core(F.linear(x, self.A)), self.B)

    def delta_weight(self) -> Float[Tensor, "*stack out in"]:
        return self.scale * (self.B @ self.core(self.A.mT).mT)

    def effective_weight(self, weight: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
        return weight + self.delta_weight()


class DoRAUpdate(nn.Module):
    """DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): W' = m (W + delta) / |W + delta|, row by row: direction and
    magnitude are learned separately.

    The norm is a constant for the gradient (section 4.3). It is of each *output* row, though the paper's "column" may
    be read otherwise."""

    def __init__(self, low: LowRankUpdate, magnitude: nn.Parameter):
        super().__init__()
        self.low, self.magnitude = low, magnitude

    def forward(
        self, x: Float[Tensor, "*batch in"], base_output: Float[Tensor, "*batch out"], weight: Callable[[], Tensor]
    ) -> Float[Tensor, "*batch out"]:
        W = weight()
        gain = self.mag_norm_scale(W).to(base_output.dtype)
        dropped = self.low.dropout(x)
        if dropped is x:
            return gain * (base_output + self.low.update(x))
        return base_output + (gain - 1) * F.linear(dropped, W) + gain * self.low.update(dropped)

    def mag_norm_scale(self, weight: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out"]:
        with torch.no_grad():
            norm = row_norms(self.low.effective_weight(weight))
        return self.magnitude / norm

    def effective_weight(self, weight: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
        return self.mag_norm_scale(weight)[..., None] * self.low.effective_weight(weight)


def row_norms(weight: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out"]:
    """The norm of each row, in at least float32."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=-1).to(weight.dtype)


class LoRAXSCore(nn.Module):
    """The core of LoRA-XS: h R^T, R (r,r), or one for each matrix of a stack."""

    def __init__(self, R: nn.Parameter):
        super().__init__()
        self.R = R

    def forward(self, h: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch r"]:
        return h @ self.R.mT


class TinyLoRACore(nn.Module):
    """The core of TinyLoRA: h R^T with R = sum_u v_u P_u; P (u,r,r) fixed and random, v (u) learned, and possibly
    shared by many matrices."""

    def __init__(self, P: nn.Parameter, v: nn.Parameter):
        super().__init__()
        self.P, self.v = P, v

    def forward(self, h: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch r"]:
        return h @ torch.einsum("u,u...->...", self.v, self.P).mT


def multiply_without_bias(base: nn.Module, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
    """W x of a layer whose matrix an adapter edits."""
    quantized = isinstance(base, QuantizedLinear | QuantizedPackedLinear)
    return base.matrix(x) if quantized else F.linear(x, base.weight)  # type: ignore[arg-type, operator, no-any-return]


class AdaptedLinear(nn.Module):
    """A linear layer and the edit of its matrix."""

    def __init__(self, base: nn.Linear | QuantizedLinear, edit: nn.Module):
        super().__init__()
        self.base, self.edit, self.enabled = base, edit, True

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not self.enabled:
            return self.base(x)
        y = self.edit(x, multiply_without_bias(self.base, x), lambda: self.base.weight)
        return y if self.base.bias is None else y + self.base.bias

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The effective matrix."""
        return self.edit.effective_weight(self.base.weight) if self.enabled else self.base.weight  # type: ignore[operator, no-any-return]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


class AdaptedPackedLinear(nn.Module):
    """A `PackedLinear` of which some parts are edited, each by itself."""

    def __init__(self, base: PackedLinear | QuantizedPackedLinear, edits: Mapping[str, nn.Module]):
        super().__init__()
        self.base, self.edits, self.enabled = base, nn.ModuleDict(edits), True

    def forward(self, x: Float[Tensor, "*batch in"]) -> tuple[Tensor, ...]:
        if not self.enabled:
            return self.base(x)
        sizes = list(self.parts.values())
        outs = multiply_without_bias(self.base, x).split(sizes, dim=-1)
        edited = (
            self.edits[name](x, out, lambda rows=self.row_slice(name): self.base.weight[rows])
            if name in self.edits
            else out
            for name, out in zip(self.parts, outs, strict=True)
        )
        if self.base.bias is None:
            return tuple(edited)
        return tuple(out + bias for out, bias in zip(edited, self.base.bias.split(sizes), strict=True))

    @property
    def parts(self) -> dict[str, int]:
        return self.base.parts

    def row_slice(self, name: str) -> slice:
        """The rows of one part."""
        return self.base.row_slice(name)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The effective matrix."""
        return merge_parts(self.base.weight, self.parts, self.edits) if self.enabled else self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


class AdaptedExperts(nn.Module):
    """Experts whose matrices are edited as they are used: the edit is computed for all experts, which then run as
    before. Dropout, which is of x, cannot be applied here."""

    def __init__(self, base: Experts | QuantizedExperts, edits: Mapping[str, nn.Module]):
        super().__init__()
        self.base, self.edits, self.enabled = base, nn.ModuleDict(edits), True

    def forward(self, x: Float[Tensor, "N D"], topk_ids: Tensor, topk_weights: Tensor) -> Float[Tensor, "N D"]:
        gate_up, down = self.gate_up, self.down
        run_experts = getattr(self.base, "run_experts", None) or fastest_backend(gate_up, down, x.dtype)
        return run_experts(x, gate_up, down, topk_ids, topk_weights, self.base.expert_activation, self.base.biases)

    @property
    def gate_up(self) -> Float[Tensor, "E F2 D"]:
        weight = as_floats(self.base.gate_up)
        return merge_parts(weight, expert_parts(self.base), self.edits) if self.enabled else weight

    @property
    def down(self) -> Float[Tensor, "E D F"]:
        weight = as_floats(self.base.down)
        return merge_parts(weight, {"down": weight.shape[1]}, self.edits) if self.enabled else weight


def as_floats(matrix: Tensor | QuantizedMatrix) -> Tensor:
    """A parameter itself, or a quantized matrix dequantized."""
    return matrix.weight if isinstance(matrix, QuantizedMatrix) else matrix


def expert_parts(experts: Experts | QuantizedExperts) -> dict[str, int]:
    """The rows of `gate_up`: gate and up, or up alone without a gate."""
    if isinstance(experts, QuantizedExperts):
        rows, hidden = experts.gate_up.q.shape[1], experts.down.width
    else:
        rows, hidden = experts.gate_up.shape[1], experts.down.shape[2]
    return {"up": rows} if rows == hidden else {"gate": hidden, "up": hidden}


def merge_parts(weight: Tensor, parts: Mapping[str, int], edits: nn.ModuleDict) -> Tensor:
    """The matrix whose rows (last dimension but one) are these parts, each with its edit if it has one."""
    if not any(name in edits for name in parts):
        return weight
    pieces = zip(parts, weight.split(list(parts.values()), dim=-2), strict=True)
    edited = [edits[name].effective_weight(piece) if name in edits else piece for name, piece in pieces]  # type: ignore[operator]
    return torch.cat(edited, dim=-2)


AdapterLayer = AdaptedLinear | AdaptedPackedLinear | AdaptedExperts


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every adapted layer of a model, by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}
