"""Writes safetensors files whose tensors begin on 64-byte boundaries, aligns tensors that do not, and allocates large
ones in large pages.

      | N (u64) | JSON header, spaces to a multiple of 64 | sizes that are multiples of 64 bytes | the other sizes |

Matrix products depend on the address of their operands: with AVX2, MKL gives other last bits for a matrix that begins 4
or 8 bytes beyond a multiple of 16. PyTorch allocates host memory on 64-byte boundaries; a tensor mapped from a file
begins where the file says. safetensors allows spaces behind the header and no gap between tensors, so the sizes
that are multiples of 64 come first, and each of them is aligned; of the other sizes only the first is sure to be. What
must give the same bits from any file is aligned by `align`, which copies what is not.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llm_quest.files import name_file_errors

ALIGNMENT = 64  # bytes: a cache line, the widest vector, and what PyTorch's host allocator gives


def align(tensor: Tensor) -> Tensor:
    """The tensor in row order, on the host beginning at a multiple of 64 bytes; a copy only where it is not."""
    rows = tensor.contiguous()
    on_host = rows.device.type == "cpu"
    return rows.clone() if on_host and rows.data_ptr() % ALIGNMENT else rows


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A new file (mode by umask), synced to disk; one tensor at a time is brought to the host. FileExistsError if
    something is there.

    Names keep their order among sizes that are multiples of 64 bytes, so that what is fused lies together."""
    order = sorted(tensors, key=lambda name: (nbytes(tensors[name]) % ALIGNMENT != 0, -tensors[name].element_size()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + nbytes(tensor)
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with name_file_errors(file), file.open("xb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            write_bytes(handle, tensors[name])
        handle.flush()
        os.fsync(handle.fileno())


def write_bytes(handle: BinaryIO, tensor: Tensor) -> None:
    memory = tensor.detach().to("cpu").contiguous()
    handle.write(raw_bytes(memory))


def raw_bytes(memory: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return memoryview(memory.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls each dtype."""


HUGE_PAGE_BYTES = 2 << 20
MIN_HUGE_PAGE_BYTES = 4 << 20
SLAB_BYTES = 32 << 20


def empty_huge_pages(shape: Sequence[int], *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """`torch.empty`, in large pages if it is big, on the host, and the system has them (Linux).

    Fresh memory costs one page fault per 4 KiB: for 500 MB that is 120,000 of them, several times as slow as the copy
    itself. With pages of 2 MiB it takes a fifth of the time, and the memory is read faster afterwards."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = map_huge_pages(nbytes) if torch.device(device).type == "cpu" and nbytes >= MIN_HUGE_PAGE_BYTES else None
    return torch.empty(shape, device=device, dtype=dtype) if memory is None else tensor_at(memory, 0, shape, dtype)


def map_huge_pages(nbytes: int) -> mmap.mmap | None:
    """Memory in large pages, whole ones; None where the system has none."""
    size = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # macOS, Windows, a kernel without them
        return None
    return memory


def tensor_at(memory: mmap.mmap, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose storage is its own part of this memory."""
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(tuple(shape))


class HugePageSlabs:
    """Allocates as `empty_huge_pages` does, and smaller tensors one behind the other in slabs of large pages: a core
    reads the weights of a small model 1.3 times as fast as from pages of 4 KiB. A slab lives as long as one of them."""

    def __init__(self) -> None:
        self.slab: mmap.mmap | None = None
        self.end = 0

    def __call__(self, shape: Sequence[int], *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        small = torch.device(device).type == "cpu" and 0 < nbytes < MIN_HUGE_PAGE_BYTES
        if small and (self.slab is None or self.end + nbytes > SLAB_BYTES):
            self.slab, self.end = map_huge_pages(SLAB_BYTES), 0
        if not small or self.slab is None:
            return empty_huge_pages(shape, device=device, dtype=dtype)
        start, self.end = self.end, self.end - (-nbytes // ALIGNMENT) * ALIGNMENT
        return tensor_at(self.slab, start, shape, dtype)
