"""MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss publishes its experts: decoded while they are read.

      byte of a block    b3 b2 b1 b0 | a3 a2 a1 a0      a: number 2p of the block, b: number 2p + 1
      number             (-1)^a3 * [0, 0.5, 1, 1.5, 2, 3, 4, 6][a2 a1 a0] * 2^(scale - 127)

32 numbers along the input share a scale, a power of two. A number has two significant bits, so that bfloat16 holds
it exactly. `NAME_blocks` (E,out,in/32,16) and `NAME_scales` (E,out,in/32) are read as NAME (E,in,out): transformers'
experts are stored input first, the blocks output first.

Commonly got wrong: the low half of a byte comes first; the scale belongs to the input's axis, which is the last one of
the blocks and the middle one of the decoded tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.hub.safetensors_io import StoredTensor, count_non_finite, read_exact

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the sixteen codes."""
NUMBERS_OF_BYTE = torch.tensor([[VALUES[byte % 16], VALUES[byte // 16]] for byte in range(256)], device="cpu")
"""The two numbers (256,2) in each byte."""


@dataclass(frozen=True)
class BlockTensor:
    """A stack of matrices (E,in,out) in blocks of 32 numbers with a scale each."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after decoding."""
        experts, rows, blocks, size = self.blocks.shape
        return experts, blocks * size * 2, rows

    @property
    def dtype(self) -> str:
        """The dtype of the stored numbers."""
        return self.blocks.dtype

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes


def join_mxfp4(sources: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors with all blocks joined to their scales. DataError where these do not fit."""
    joined = dict(sources)
    for name in [name for name in sources if name.endswith(BLOCKS)]:
        whole = name.removesuffix(BLOCKS)
        blocks, scales = joined[name], joined.get(whole + SCALES)
        if not isinstance(scales, StoredTensor) or not is_blocks(blocks, scales):
            shapes = f"{tuple(blocks.shape)} and {tuple(scales.shape) if scales is not None else 'no scales'}"
            raise DataError(
                f"{whole}: {shapes} are no MXFP4 blocks (E,out,in/32,16) with scales (E,out,in/32) of bytes"
            )
        del joined[name], joined[whole + SCALES]
        joined[whole] = BlockTensor(blocks, scales)
    return joined


def is_blocks(blocks: StoredTensor, scales: StoredTensor) -> bool:
    are_bytes = blocks.dtype == "U8" and scales.dtype in ("U8", "F8_E8M0")
    return are_bytes and len(blocks.shape) == 4 and blocks.shape[3] == 16 and blocks.shape[:3] == scales.shape


def read_blocks_into(source: BlockTensor, out: Tensor) -> int:
    """Decode into `out` (E,in,out; out may be split; any device and dtype), matrix by matrix; how many numbers are not
    finite."""
    bad = 0
    with source.blocks.file.open("rb", buffering=0) as blocks, source.scales.file.open("rb", buffering=0) as scales:
        blocks.seek(source.blocks.start)
        scales.seek(source.scales.start)
        for matrix in out:
            decoded = decode_mxfp4(read_bytes(blocks, source.blocks), read_bytes(scales, source.scales))
            bad += count_non_finite(decoded)
            matrix.copy_(decoded.mT.reshape(matrix.shape))
    return bad


def read_bytes(handle: BinaryIO, stored: StoredTensor) -> Tensor:
    """Read the next matrix of a stack, as bytes."""
    memory = torch.empty(stored.shape[1:], dtype=torch.uint8)
    read_exact(handle, memory, stored.file)
    return memory


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode blocks (...,blocks,16) and scales (...,blocks) of uint8 to (...,32 blocks) float32. The scale 255 stands
    for NaN."""
    numbers = torch.ldexp(NUMBERS_OF_BYTE[blocks.long()].flatten(-2), scales.to(torch.int32)[..., None] - 127)
    return numbers.masked_fill_(scales[..., None] == 255, float("nan")).flatten(-2)
