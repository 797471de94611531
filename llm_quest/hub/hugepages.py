"""Host memory in large pages, where the system has them.

Fresh memory costs one page fault per 4 KiB: for 500 MB that is 120,000 of them, several times as slow as the copy
itself. With pages of 2 MiB it takes a fifth of the time, and the memory is read faster afterwards.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_HUGE_PAGE_BYTES = 4 << 20


def empty_huge_pages(shape: Sequence[int], *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """`torch.empty`, in large pages if it is big, on the host, and this is Linux."""
    nbytes = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or torch.device(device).type != "cpu" or nbytes < MIN_HUGE_PAGE_BYTES:
        return torch.empty(shape, device=device, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
