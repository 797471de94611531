"""Formats of quantized weights: W ~ scale * level[code], one scale for each group of consecutive numbers of a row.

    format  bits  group       levels
    int8    8     whole row   -127 ... 127
    int4    4     32          -8 ... 7 (llama.cpp's Q4_0)
    nf4     4     32          16 quantiles of N(0,1), divided by the largest (QLoRA, arXiv:2305.14314, appendix E)

`quantize` and `dequantize` are the definitions; `layers/quantized_kernels.py` computes products without writing the
floats to memory. Scales are bfloat16 numbers whatever the model's dtype, so no dtype of a model changes a weight.

Codes of 4 bits lie in pairs: byte j of a group's 16 has weight j in its low half and weight j + 16 in its high half, as
in Q4_0. A row whose width is no multiple of the group is padded with zeros.

Differs: QLoRA has groups of 64 and quantizes the scales once more; here one scale of 2 bytes serves 32 weights (4.5
bits a weight against 4.13), which is more exact. An int4 scale is the one with the least squared error of several,
where Q4_0 takes the largest number / -8: on normal weights the squared error is 0.91 of Q4_0's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Int8 as Bytes
from torch import Tensor
from torch.nn import functional as F

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The published table (appendix E)."""
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class WeightFormat:
    """bits: of a code. group_size: how many numbers share a scale; 0: the whole row. levels: what each code stands for,
    as a multiple of the scale; empty: the code itself."""

    name: str
    bits: int
    group_size: int = 0
    levels: tuple[float, ...] = ()


FORMATS = {
    one.name: one
    for one in (
        WeightFormat("int8", 8),
        WeightFormat("int4", 4, 32, tuple(float(level) for level in range(-8, 8))),
        WeightFormat("nf4", 4, 32, NF4_LEVELS),
    )
}
HEAD_FORMAT = FORMATS["int8"]
"""The format of heads and tied embeddings, whatever that of the blocks: their error reaches every logit unaveraged."""


def packed_shapes(shape: tuple[int, ...], form: WeightFormat) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of codes and scales of a matrix, or a stack of matrices, of this shape."""
    if not form.group_size:
        return shape, shape[:-1]
    groups = -(-shape[-1] // form.group_size)
    return (*shape[:-1], groups * form.group_size * form.bits // 8), (*shape[:-1], groups)


def quantize(
    weight: Float[Tensor, "*stack out in"], form: WeightFormat
) -> tuple[Bytes[Tensor, "*stack out packed"], Float[Tensor, "*scales"]]:
    """Codes and scales. A weight on the meta device gives empty ones."""
    if weight.device.type == "meta":
        packed, scales = packed_shapes(tuple(weight.shape), form)
        return torch.empty(packed, dtype=torch.int8, device="meta"), weight.new_empty(scales)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not form.group_size:
        row_scale = round_scale(wide.abs().amax(dim=-1) / 127)
        q = (wide / row_scale[..., None]).round().clamp(-127, 127).to(torch.int8)
        return q, row_scale.to(weight.dtype)
    groups = F.pad(wide, (0, -wide.shape[-1] % form.group_size)).unflatten(-1, (-1, form.group_size))
    scale, codes = (fit_int4 if form.name == "int4" else fit_levels)(groups, form)
    return pack_pairs(codes), scale.to(weight.dtype)


def round_scale(scale: Tensor) -> Tensor:
    """The nearest bfloat16 number that is no zero, in the dtype it came in."""
    return scale.clamp(min=SMALLEST_SCALE).to(torch.bfloat16).to(scale.dtype)


def fit_levels(groups: Float[Tensor, "*rows G g"], form: WeightFormat) -> tuple[Tensor, Tensor]:
    """The scale makes the largest number of a group 1; each number takes the nearest level."""
    levels = torch.tensor(form.levels, dtype=groups.dtype, device=groups.device)
    scale = round_scale(groups.abs().amax(dim=-1) / levels.abs().max())
    between = (levels[1:] + levels[:-1]) / 2
    return scale, torch.bucketize(groups / scale[..., None], between)


INT4_STEPS = (9.0, 8.5, 8.0, 7.5, 7.0, 6.5)
"""How many steps of the scale the largest number of a group may have; `fit_int4` tries each. Above 8 that number is cut
to 8 steps; below, the other numbers are rounded to coarser steps."""


def fit_int4(groups: Float[Tensor, "*rows G g"], form: WeightFormat) -> tuple[Tensor, Tensor]:
    """Of several scales the one with the least squared error. A scale's sign is that of the side that reaches -8, so
    the largest number has the code 0 whichever sign it has."""
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))[..., 0]
    best_error, best_scale, best_codes = None, largest, groups
    for steps in INT4_STEPS:
        magnitude = round_scale(largest.abs() / steps)
        scale = torch.where(largest > 0, -magnitude, magnitude)
        levels = (groups / scale[..., None]).round().clamp(-8, 7)
        error = (levels * scale[..., None] - groups).square().sum(dim=-1)
        better = torch.ones_like(error, dtype=torch.bool) if best_error is None else error < best_error
        best_error = error if best_error is None else torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better[..., None], levels + 8, best_codes)
    return best_scale, best_codes


def pack_pairs(codes: Tensor) -> Bytes[Tensor, "*rows packed"]:
    """Codes below 16 (..., G, 32) as bytes (..., G * 16)."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).flatten(-2).view(torch.int8)


def unpack_pairs(q: Bytes[Tensor, "*rows packed"], group_size: int) -> Tensor:
    """The inverse of `pack_pairs`, as integers that index the levels."""
    pairs = q.view(torch.uint8).unflatten(-1, (-1, group_size // 2)).to(torch.int32)
    return torch.cat((pairs & 15, pairs >> 4), dim=-1)


def dequantize(
    q: Bytes[Tensor, "*rows packed"], scale: Float[Tensor, "*scales"], form: WeightFormat, width: int
) -> Float[Tensor, "*rows in"]:
    """The rows as floats of the scale's dtype: the definition of what codes and scales stand for."""
    if not form.group_size:
        return q.to(scale.dtype) * scale[..., None]
    levels = torch.tensor(form.levels, dtype=scale.dtype, device=scale.device)
    return (levels[unpack_pairs(q, form.group_size)] * scale[..., None]).flatten(-2)[..., :width]
