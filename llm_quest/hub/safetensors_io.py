"""The safetensors format: 8 bytes length, a JSON header, then raw little-endian numbers; read one tensor at a time
(`tensor_files.py` writes it).

      | N (u64) | {"name": {"dtype": "F32", "shape": [2,3], "data_offsets": [0,24]}, ...} | data |

Tensors are read by offset, with plain file reads, into the memory that will hold them; copying from a mapping would
need the memory twice. Tensors that need no copy are mapped (`mmap.py`). Every number of the header is checked against
the file's size before anything is allocated.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.tensor_files import DTYPE_NAMES, empty_huge_pages, raw_bytes

HEADER_LIMIT = 10_000_000
LFS_POINTER = b"version https://git-lfs"
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: `nbytes` bytes from `start` on."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header: every tensor of a file. Raises DataError for a file that is not regular, is truncated, has a
    header that is too large, repeats a name, or whose tensors overlap, leave gaps or have absurd shapes."""
    size = regular_file_size(file)
    refuse_lfs_pointer(file)
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > HEADER_LIMIT or 8 + length > size:
            claim = f"its header says {length:,} bytes, the file has {size:,}"
            raise DataError(f"{file.name}: no safetensors file, or cut off: {claim}")
        text = handle.read(length)
    try:
        header = parse_unique_json(text)
    except DataError as error:
        raise DataError(f"{file.name}: header: {error}") from None
    header.pop("__metadata__", None)
    stored = {name: read_entry(file, name, entry, 8 + length) for name, entry in header.items()}
    check_layout(file, stored, 8 + length, size)
    return stored


def read_entry(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One header entry; `data` is where the numbers begin."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if dtype not in DTYPE_BITS or not is_size_list(shape) or not is_size_list(offsets) or len(offsets) != 2:
        raise DataError(f"{file.name}: header entry of {name!r} cannot be read: {json.dumps(entry)[:120]}")
    start, nbytes = offsets[0], offsets[1] - offsets[0]
    if any(dim >= 2**40 for dim in shape) or math.prod(shape) * DTYPE_BITS[dtype] != 8 * nbytes:
        raise DataError(f"{file.name}: {name} claims shape {tuple(shape)} of {dtype} in {nbytes:,} bytes")
    return StoredTensor(file, dtype, tuple(shape), data + start, nbytes)


def check_layout(file: Path, stored: Mapping[str, StoredTensor], data: int, size: int) -> None:
    """Raise DataError unless the tensors fill the file from the header to the end, without gap or overlap."""
    end = data
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            kind = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise DataError(f"{file.name}: {name} {kind}: a damaged or forged file")
        end += tensor.nbytes
    if end != size:
        kind = "cut off" if size < end else "longer than its header says"
        raise DataError(f"{file.name}: {kind}: {end:,} bytes expected, {size:,} there; copy or download it again")


def read_into(stored: StoredTensor, out: Tensor) -> int:
    """Copy a stored tensor into `out` (any device, dtype and strides, the stored shape); returns how many of its
    numbers are not finite. Plain host memory of the stored dtype is read into directly, anything else by way of a small
    buffer."""
    dtype = (FLOAT_DTYPES | INT_DTYPES)[stored.dtype]
    direct = out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()
    bad, buffer = 0, None
    with torch.no_grad(), stored.file.open("rb", buffering=0) as handle:
        handle.seek(stored.start)
        for part in row_chunks(out, stored.nbytes):
            if not direct and (buffer is None or buffer.shape != part.shape):
                buffer = empty_huge_pages(part.shape, dtype=dtype, device="cpu")
            memory = part if buffer is None else buffer
            read_exact(handle, memory, stored.file)
            bad += count_non_finite(memory)
            if buffer is not None:
                copy_tensor(buffer, part)
    return bad


def equal_tensors(a: Any, b: Any) -> bool:
    """Whether two tensors, of files or in memory, hold the same numbers. Reads pieces up to the first that differs."""
    if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    with a.file.open("rb") as one, b.file.open("rb") as other:
        one.seek(a.start)
        other.seek(b.start)
        sizes = (min(CHUNK_BYTES, a.nbytes - done) for done in range(0, a.nbytes, CHUNK_BYTES))
        return all(one.read(size) == other.read(size) for size in sizes)


def row_chunks(out: Tensor, nbytes: int) -> Iterator[Tensor]:
    """Views of consecutive rows, of about CHUNK_BYTES each; a tensor that will be transposed stays whole."""
    if not out.numel():
        return
    whole = (out.dim() != 1 and not out.is_contiguous()) or out.dim() == 0
    yield from (out,) if whole else out.split(max(1, out.shape[0] * CHUNK_BYTES // nbytes))


def read_exact(handle: Any, memory: Tensor, file: Path) -> None:
    """Read exactly as many bytes as this host tensor has."""
    view = raw_bytes(memory)
    while view:
        count = handle.readinto(view)
        if not count:
            raise DataError(f"{file.name}: became shorter while it was read; load it again once nobody writes to it")
        view = view[count:]


def count_non_finite(memory: Tensor) -> int:
    """Count the numbers that are infinite or NaN. A sum is finite for good data and costs a tenth of looking at each.

    Commonly got wrong: a sum with a wider dtype writes the whole tensor out in that dtype first, three times as slow;
    bfloat16 is summed in float32 anyway, only float16 must be widened lest its sum overflow."""
    wider = torch.float32 if memory.dtype == torch.float16 else None
    parts = list(row_chunks(memory, memory.nbytes)) if memory.is_floating_point() else []
    doubtful = [part for part in parts if not part.sum(dtype=wider).isfinite()]
    return sum(int(part.isfinite().logical_not().sum()) for part in doubtful)


def copy_tensor(source: Tensor, target: Tensor) -> None:
    """Copy source to target; if the target is a transposed view, both are transposed first, which torch copies
    faster."""
    is_transposed = target.dim() == 2 and target.stride(0) == 1
    (target.T if is_transposed else target).copy_(source.T if is_transposed else source)


def regular_file_size(file: Path) -> int:
    """The size of a file in bytes. DataError if it is missing or no regular file (a device or a pipe would never
    end)."""
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file.name}: cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file.name}: is no regular file")
    return status.st_size


def refuse_lfs_pointer(file: Path) -> None:
    """DataError where git left a pointer in place of the file, which a clone without git-lfs does."""
    with file.open("rb") as handle:
        if handle.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(
                f"{file.name}: is a git-lfs pointer, not the file: run `git lfs pull` in this folder, or `hf download`"
            )


def parse_unique_json(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. DataError for duplicate names, which readers resolve differently."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=reject_duplicate_keys)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"no valid JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise DataError(f"a JSON object was expected, not {type(value).__name__}")
    return value


def reject_duplicate_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise DataError(f"the name {name!r} appears twice")
        mapping[name] = value
    return mapping


def is_size_list(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


FLOAT_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
INT_DTYPES = {DTYPE_NAMES[torch.int8]: torch.int8}
DTYPE_BITS = {name: dtype.itemsize * 8 for name, dtype in FLOAT_DTYPES.items()} | {
    **dict.fromkeys(("I64", "U64", "C64"), 64),
    **dict.fromkeys(("I32", "U32"), 32),
    **dict.fromkeys(("I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
