"""x W^T with a quantized W: one operator of ours for eager, compiled and exported code, and a kernel in C++ behind it.

- `quantized_linear_reference` is the definition: the product with the dequantized matrix, in the dtype of x.
- The operator `llm_quest::quantized_linear` computes it on any device, has a shape rule (meta device, compiling,
  exporting) and a backward pass: dx = dy W. W has no gradient, and no float copy of it is kept for the backward pass.
- The operator `llm_quest::quantized_rows` (quantized_rows.cpp; AVX2, AVX512 or plain C++) reads the codes once and
  widens them in registers, for few rows on a CPU. It multiplies and adds in float32 (int4, and int8 where the
  processor multiplies bytes: in integers, with x rounded to 2^-23 of the largest of its 32 numbers), and every row of x
  is summed in the same order whatever rows come with it.

torch's own kernels are not used: `aten._weight_int8pack_mm` rounds x and y to bfloat16, reads beyond rows whose width
is no multiple of 16, and inductor cannot compile it for a computed input (docs/LOG.md).

Commonly got wrong: dx = dy W needs W with its signs and scales, not the codes; a row's sum must not depend on the rows
beside it; NaN and infinity pass through.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from jaxtyping import Int8 as Bytes
from torch import Tensor
from torch.nn import functional as F

from llm_quest.layers import native
from llm_quest.layers.linear import autocast_dtype
from llm_quest.layers.weight_formats import FORMATS, WeightFormat, dequantize

MAX_KERNEL_ROWS = 64
"""Above so many rows of x the matrix is dequantized once, and the product is the host's own."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_FORMATS = {"int8": 0, "int4": 1, "nf4": 2}
"""What the kernel's argument `format` means."""
LEVELS = {name: torch.tensor(form.levels or (0.0,) * 16) for name, form in FORMATS.items()}


def quantized_linear_reference(
    x: Float[Tensor, "N in"], q: Bytes[Tensor, "out packed"], scale: Tensor, form: WeightFormat
) -> Float[Tensor, "N out"]:
    """The definition."""
    return F.linear(x, dequantize(q, scale, form, x.shape[-1]).to(x.dtype))


torch.library.define(
    "llm_quest::quantized_linear",
    "(Tensor x, Tensor q, Tensor scale, str form, SymInt width) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("llm_quest::quantized_linear", "default")
def compute_quantized_linear(x: Tensor, q: Tensor, scale: Tensor, form: str, width: int) -> Tensor:
    """x (N,in), codes and scales of W (out,in), the name of their format, in -> x W^T (N,out)."""
    return quantized_linear_reference(x, q, scale, FORMATS[form])


@torch.library.register_fake("llm_quest::quantized_linear")
def _(x: Tensor, q: Tensor, scale: Tensor, form: str, width: int) -> Tensor:
    return x.new_empty(x.shape[0], q.shape[0])


def save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str, int], output: Tensor) -> None:
    _, q, scale, ctx.form, ctx.width = inputs
    ctx.save_for_backward(q, scale)


def input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    """dx = dy W."""
    q, scale = ctx.saved_tensors
    weight = dequantize(q, scale, FORMATS[ctx.form], ctx.width)
    return gradient @ weight.to(gradient.dtype), None, None, None, None


torch.library.register_autograd("llm_quest::quantized_linear", input_gradient, setup_context=save_for_backward)


def quantized_linear(
    x: Float[Tensor, "*batch in"], q: Bytes[Tensor, "out packed"], scale: Tensor, form: WeightFormat
) -> Float[Tensor, "*batch out"]:
    """x W^T, by the kernel where it applies. Under autocast x has the autocast dtype, as for F.linear."""
    x = x.to(autocast_dtype(x) or x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    if takes_kernel(flat, q):
        y = native_rows(flat, q, scale, form)
    elif torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        y = torch.ops.llm_quest.quantized_linear(flat, q, scale, form.name, flat.shape[1])
    else:
        y = quantized_linear_reference(flat, q, scale, form)
    return y.view(*x.shape[:-1], q.shape[0])


def takes_kernel(x: Float[Tensor, "N in"], q: Tensor) -> bool:
    """Few rows on a CPU, no gradient, and a kernel that was built. An exported program does not depend on it."""
    return (
        x.device.type == q.device.type == "cpu"
        and x.dtype in KERNEL_DTYPES
        and x.shape[0] <= MAX_KERNEL_ROWS
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_exporting()
        and native.is_loaded_or_warn()
    )


def native_rows(
    x: Float[Tensor, "N in"], q: Bytes[Tensor, "out packed"], scale: Tensor, form: WeightFormat, isa: int = 0
) -> Float[Tensor, "N out"]:
    """The product by the C++ operator. isa: see `native.ISA`; 0 is the best of this machine."""
    wide = x.to(torch.float32)
    if form.group_size and (missing := -wide.shape[1] % form.group_size):
        wide = F.pad(wide, (0, missing))
    scale = scale.to(torch.float32) if scale.dtype == torch.float16 else scale
    y = torch.ops.llm_quest.quantized_rows(
        wide.contiguous(), q, scale, LEVELS[form.name], KERNEL_FORMATS[form.name], isa
    )
    return y.to(x.dtype)  # type: ignore[no-any-return]
