"""Encoding of tensors in GGUF files: plain floats, and two formats of blocks of 32 numbers of a row.

      Q8_0   | d (float16) | q_0 ... q_31 (int8) |                        34 bytes    x = d q
      Q4_0   | d (float16) | q_16 q_0 | q_17 q_1 | ... | q_31 q_15 |      18 bytes    x = d (q - 8)

Q8_0: d = max|x| / 127, q = x / d rounded half away from zero. Q4_0: d = m / -8 with m the number of largest magnitude
(the first one), q = trunc(x / d + 8.5), at most 15; so m is met exactly, and the other side reaches 7/8 of it.

Commonly got wrong: x is divided by d before d is rounded to float16; a tie rounds away from zero, not to even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_quest.hub.gguf import TENSOR_TYPES, TensorData
from llm_quest.hub.gguf_dequantize import DEQUANTIZE_ONLY
from llm_quest.hub.safetensors_io import CHUNK_BYTES, StoredTensor, count_non_finite, read_exact
from llm_quest.tensor_files import DTYPE_NAMES, raw_bytes

PLAIN = {DTYPE_NAMES[dtype]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
"""Tensor types that are a dtype of torch."""
BLOCK = 32


def split_scale(blocks: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """x / d of each block (N,32), and the bytes (N,2) of d in float16."""
    inverse = torch.where(d == 0, 0.0, 1 / d)
    return blocks * inverse, d.to(torch.float16).view(torch.uint8)


def quantize_q8_0(blocks: Tensor) -> Tensor:
    """Quantize blocks (N,32) of float32 to Q8_0, (N,34) bytes."""
    scaled, d = split_scale(blocks, blocks.abs().amax(dim=1, keepdim=True) / 127)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = scaled.sign() * (whole + (2 * (magnitude - whole)).floor())
    return torch.cat((d, rounded.to(torch.int8).view(torch.uint8)), dim=1)


def quantize_q4_0(blocks: Tensor) -> Tensor:
    """Quantize blocks (N,32) of float32 to Q4_0, (N,18) bytes."""
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scaled, d = split_scale(blocks, largest / -8)
    q = (scaled + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((d, q[:, :16] | q[:, 16:] << 4), dim=1)


def dequantize_q8_0(data: Tensor) -> Tensor:
    """Dequantize Q8_0, (N,34) bytes, to (N,32) float32."""
    return data[:, 2:].view(torch.int8).float() * data[:, :2].view(torch.float16).float()


def dequantize_q4_0(data: Tensor) -> Tensor:
    """Dequantize Q4_0, (N,18) bytes, to (N,32) float32."""
    halves = torch.cat((data[:, 2:] & 15, data[:, 2:] >> 4), dim=1)
    return (halves.to(torch.int8) - 8).float() * data[:, :2].view(torch.float16).float()


QUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": quantize_q8_0, "Q4_0": quantize_q4_0}
DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": dequantize_q8_0,
    "Q4_0": dequantize_q4_0,
    **DEQUANTIZE_ONLY,
}
READ_TYPES = (*PLAIN, *DEQUANTIZE)


def encode_chunks(tensor: Tensor, dtype: str, change: Callable[[Tensor], Tensor] | None = None) -> Iterator[Any]:
    """The bytes of a tensor in this type, in pieces of some megabytes. change: of the numbers, in float32."""
    entries = max(1, tensor.shape[0] * CHUNK_BYTES // max(1, tensor.numel() * 4))
    for part in tensor.detach().split(entries):
        if change is not None:
            part = change(part.float())
        if dtype in QUANTIZE:
            yield raw_bytes(QUANTIZE[dtype](part.float().reshape(-1, BLOCK)).contiguous())
        else:
            yield raw_bytes(part.to(PLAIN[dtype]).contiguous())


def tensor_data(tensor: Tensor, dtype: str) -> TensorData:
    """A tensor to write in this type."""
    return TensorData(dtype, tuple(tensor.shape), lambda: encode_chunks(tensor, dtype))


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor of a GGUF file that is decoded while it is read: blocks, or floats that are changed. change: applied to
    the decoded numbers."""

    stored: StoredTensor
    change: Callable[[Tensor], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes


def read_encoded_into(source: EncodedTensor, out: Tensor) -> int:
    """Decode into `out` (the stored shape, of which one dimension may be split; any device and dtype), in pieces along
    its first dimension; how many numbers are not finite."""
    kind, bad = TENSOR_TYPES[source.dtype], 0
    entries = max(1, out.shape[0] * CHUNK_BYTES // max(1, source.nbytes))
    with source.stored.file.open("rb", buffering=0) as handle:
        handle.seek(source.stored.start)
        for part in out.split(entries):
            memory = torch.empty(part.numel() // kind.size * kind.nbytes, dtype=torch.uint8)
            read_exact(handle, memory, source.stored.file)
            numbers = decode(memory, source.dtype)
            numbers = numbers if source.change is None else source.change(numbers)
            bad += count_non_finite(numbers)
            part.copy_(numbers.view(part.shape))
    return bad


def decode(memory: Tensor, dtype: str) -> Tensor:
    """Decode bytes of a tensor type to float32."""
    if dtype in PLAIN:
        return memory.view(PLAIN[dtype]).float()
    return DEQUANTIZE[dtype](memory.view(-1, TENSOR_TYPES[dtype].nbytes)).flatten()
