"""Block-scaled fp8, as DeepSeek-V3, Kimi K2 and MiMo publish their matrices: decoded while they are read.

      W[i, j] = q[i, j] * s[i // 128, j // 128]      q (out,in) float8_e4m3, s (ceil(out/128), ceil(in/128)) float32

q has 4 significant bits, so the product in float32 is exact up to its own rounding; one more to the model's dtype
follows. The last blocks may be partial: DeepSeek's kv_a_proj (576 rows) has 5 rows of scales. A scale may also be
one number for the matrix, or one for each row, and may be stored as a power of two (ue8m0).

Commonly got wrong: the scale is called `weight_scale_inv`, and one multiplies by it nevertheless. Serving engines round
activations to fp8 too; here they are not rounded, which is more exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.hub.safetensors_io import FLOAT_DTYPES, StoredTensor, count_non_finite, read_exact, read_into

SCALE_SUFFIX = "_scale_inv"
ACTIVATION_SCALES = (".activation_scale", ".input_scale")
"""Suffixes of the scales of activations, which stay in the model's dtype here."""
FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
POWERS_OF_TWO = ("F8_E8M0", "U8")
CHUNK_ROWS = 512


@dataclass(frozen=True)
class ScaledTensor:
    """A matrix in fp8 and its scales. block: rows and columns that share one; None for one a matrix or a row."""

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> str:
        """The dtype of the stored numbers."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def fp8_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """The weight_block_size of a quantization_config; None without one."""
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise DataError(f"config.json: weight_block_size is {block!r}; two whole numbers were expected")
    return block[0], block[1]


def join_fp8(sources: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors with each fp8 matrix joined to its scales; scales of activations are left out."""
    block = fp8_block(quantization)
    stored = {name: source for name, source in sources.items() if not name.endswith(ACTIVATION_SCALES)}
    for name in sources:
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight != name and getattr(sources.get(weight), "dtype", None) in FP8_DTYPES:
            stored[weight] = ScaledTensor(sources[weight], stored.pop(name), block)
    return stored


def read_scaled_into(source: ScaledTensor, out: Tensor) -> int:
    """Decode into `out` (any device and dtype); how many numbers are not finite. A stack of matrices one by one."""
    scales, bad = read_scales(source), 0
    *stack, rows, columns = source.shape
    for index, (matrix, scale) in enumerate(zip(list(out) if stack else [out], scales, strict=True)):
        row_scales = scale if source.block is None else scale.repeat_interleave(source.block[1], dim=1)[:, :columns]
        for start, part in raw_rows(source.weight, index * rows, rows, columns):
            numbers = torch.arange(start, start + len(part)) // (source.block[0] if source.block else 1)
            decoded = part.to(torch.float32) * (row_scales[numbers] if len(row_scales) > 1 else row_scales)
            bad += count_non_finite(decoded)
            matrix[start : start + len(part)].copy_(decoded)
    return bad


def read_scales(source: ScaledTensor) -> list[Tensor]:
    """For each matrix its scales in float32: (blocks of rows, blocks of columns), (rows,1) or (1,1). DataError where
    they do not fit the matrix."""
    *stack, rows, columns = source.shape
    stored = source.scale
    if stored.dtype in FLOAT_DTYPES:
        scales = torch.empty(stored.shape, dtype=torch.float32)
        read_into(stored, scales)
    elif stored.dtype in POWERS_OF_TWO:
        with stored.file.open("rb", buffering=0) as handle:
            handle.seek(stored.start)
            read_exact(handle, exponents := torch.empty(stored.shape, dtype=torch.uint8), stored.file)
        scales = torch.exp2(exponents.to(torch.float32) - 127)
    else:
        raise DataError(
            f"{stored.file.name}: scales stored as {stored.dtype}; {', '.join(FLOAT_DTYPES)} or powers of two"
        )
    if source.block is None:
        fits, shape = scales.numel() in (1, rows), (max(1, scales.numel()), 1)
    else:
        shape = (-(-rows // source.block[0]), -(-columns // source.block[1]))
        fits = tuple(scales.shape) == (*stack, *shape)
    if not fits or (stack and source.block is None):
        raise DataError(
            f"{stored.file.name}: scales of shape {tuple(stored.shape)} do not fit a matrix {source.shape} in blocks "
            f"of {source.block}"
        )
    return list(scales.reshape(-1, *shape))


def raw_rows(stored: StoredTensor, first: int, rows: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Rows first..first+rows of a matrix in fp8, a few hundred at a time, with their numbers."""
    with stored.file.open("rb", buffering=0) as handle:
        handle.seek(stored.start + first * columns)
        for start in range(0, rows, CHUNK_ROWS):
            memory = torch.empty(min(CHUNK_ROWS, rows - start), columns, dtype=torch.uint8)
            read_exact(handle, memory, stored.file)
            yield start, memory.view(FP8_DTYPES[stored.dtype])
