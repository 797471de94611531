"""Formats of quantized weights: W ~ scale * level[code] (+ minimum), one scale for each group of numbers of a row.

    format  bits  group       levels                    bits of a weight with its share of the scales, in bfloat16
    int8    8     whole row   -127 ... 127              8
    int4    4     32          0 ... 15, + minimum       5 (llama.cpp's Q4_1)
    nf4     4     32          16 quantiles of N(0,1)    4.5 (QLoRA, arXiv:2305.14314, appendix E)

`quantize` and `dequantize` are the definitions; `layers/quantized_kernels.py` computes products without writing the
floats to memory. Scales are bfloat16 numbers whatever the model's dtype, so no dtype of a model changes a weight.

Codes of 4 bits lie in pairs: byte j of a group's 16 has weight j in its low half and weight j + 16 in its high half, as
in llama.cpp. A row whose width is no multiple of the group is padded with zeros.

Differs: QLoRA has groups of 64 and quantizes the scales once more; here one scale of 2 bytes serves 32 weights (4.5
bits a weight against 4.13), which is more exact. int4's scale and minimum are fitted to the least squared error, which
is 0.70 of that of Q4_0 and 0.84 of Q4_1's smallest and largest number on normal weights.

Commonly got wrong: int8 has one scale for each row, not one for the matrix, in which a single large row would take the
others' precision; the low half of a byte is weight j and the high half weight j + 16, not neighbors.
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
    """A format of quantized weights. bits: of a code. group_size: how many numbers share a scale; 0: the whole row.
    levels: what each code stands for, as a multiple of the scale; empty: the code itself. has_minimum: a number is
    added that each group has beside its scale; both are in one tensor, (..., 2, G)."""

    name: str
    bits: int
    group_size: int = 0
    levels: tuple[float, ...] = ()
    has_minimum: bool = False


FORMATS = {
    one.name: one
    for one in (
        WeightFormat("int8", 8),
        WeightFormat("int4", 4, 32, has_minimum=True),
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
    scales = (*shape[:-1], 2, groups) if form.has_minimum else (*shape[:-1], groups)
    return (*shape[:-1], groups * form.group_size * form.bits // 8), scales


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
    scale, codes = fit_minimum(groups) if form.has_minimum else fit_levels(groups, form)
    return pack_pairs(codes), scale.to(weight.dtype)


def round_scale(scale: Tensor) -> Tensor:
    """The nearest bfloat16 numbers that are no zeros, in the dtype they came in."""
    return to_bfloat16(scale.clamp(min=SMALLEST_SCALE))


def to_bfloat16(value: Tensor) -> Tensor:
    """The nearest bfloat16 numbers, in the dtype they came in."""
    return value.to(torch.bfloat16).to(value.dtype)


def fit_levels(groups: Float[Tensor, "*rows G g"], form: WeightFormat) -> tuple[Tensor, Tensor]:
    """The scale makes the largest number of a group 1; each number takes the nearest level."""
    levels = torch.tensor(form.levels, dtype=groups.dtype, device=groups.device)
    scale = round_scale(groups.abs().amax(dim=-1) / levels.abs().max())
    between = (levels[1:] + levels[:-1]) / 2
    return scale, torch.bucketize(groups / scale[..., None], between)


SHRINKAGES, REFITS = (1.0, 0.9), 3


def fit_minimum(groups: Float[Tensor, "*rows G g"]) -> tuple[Float[Tensor, "*rows 2 G"], Tensor]:
    """Scale and minimum of each group, and its codes 0 ... 15, with the least squared error of several fits: from the
    smallest to the largest number, and from a narrower range, which cuts those two; each time codes and line are fitted
    to one another REFITS times."""
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    best: tuple[Tensor, ...] = (torch.full_like(low, float("inf")), low, low, groups)
    for shrinkage in SHRINKAGES:
        scale, minimum = (high - low) * shrinkage / 15, low * shrinkage
        for _ in range(1 + REFITS):
            scale, minimum = round_scale(scale), to_bfloat16(minimum)
            codes = ((groups - minimum) / scale).round().clamp(0, 15)
            error = (codes * scale + minimum - groups).square().sum(dim=-1, keepdim=True)
            fit = (error, scale, minimum, codes)
            best = tuple(torch.where(error < best[0], new, old) for new, old in zip(fit, best, strict=True))
            scale, minimum = fit_line(codes, groups)
    _, scale, minimum, codes = best
    return torch.stack((scale[..., 0], minimum[..., 0]), dim=-2), codes


def fit_line(codes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum with the least squared error for these codes. (Differences from the means: sums of squares
    would cancel.)"""
    code_mean, mean = codes.mean(dim=-1, keepdim=True), groups.mean(dim=-1, keepdim=True)
    deviation = codes - code_mean
    spread = deviation.square().sum(dim=-1, keepdim=True).clamp(min=SMALLEST_SCALE)
    scale = (deviation * (groups - mean)).sum(dim=-1, keepdim=True) / spread
    return scale, mean - scale * code_mean


def pack_pairs(codes: Tensor) -> Bytes[Tensor, "*rows packed"]:
    """Codes below 16 (..., G, 32) as bytes (..., G * 16)."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).flatten(-2).view(torch.int8)


def unpack_pairs(q: Bytes[Tensor, "*rows packed"], group_size: int) -> Tensor:
    """Unpack the codes: the inverse of `pack_pairs`, as integers that index the levels."""
    pairs = q.view(torch.uint8).unflatten(-1, (-1, group_size // 2)).to(torch.int32)
    return torch.cat((pairs & 15, pairs >> 4), dim=-1)


def dequantize(
    q: Bytes[Tensor, "*rows packed"], scale: Float[Tensor, "*scales"], form: WeightFormat, width: int
) -> Float[Tensor, "*rows in"]:
    """The rows as floats of the scale's dtype: the definition of what codes and scales stand for."""
    if not form.group_size:
        return q.to(scale.dtype) * scale[..., None]
    codes = unpack_pairs(q, form.group_size)
    if form.has_minimum:
        steps, minimum = scale.unbind(dim=-2)
        return (codes.to(scale.dtype) * steps[..., None] + minimum[..., None]).flatten(-2)[..., :width]
    levels = torch.tensor(form.levels, dtype=scale.dtype, device=scale.device)
    return (levels[codes] * scale[..., None]).flatten(-2)[..., :width]
