"""The GGUF format, version 3, of llama.cpp and the programs built on it.

      | GGUF | version | tensors | pairs | key, type, value ... | name, dimensions, type, offset ... | pad | data ... |

All numbers are little-endian; a string is its length (u64) and its UTF-8 bytes. Each tensor's data begins at the next
multiple of `general.alignment` (32) behind the one before it.

Commonly got wrong: dimensions are written fastest first, the reverse of a torch shape; a float64 where llama.cpp
expects a float32 is refused there, so every value has its type here. (Format: github.com/ggml-org/ggml, docs/gguf.md.)
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llm_quest.errors import DISK_REMEDIES, DataError
from llm_quest.hub.safetensors_io import StoredTensor, refuse_lfs_pointer, regular_file_size

MAGIC, VERSION, READ_VERSIONS = b"GGUF", 3, (2, 3)
TOKENIZER = "tokenizer.ggml."
"""Prefix of the keys of a tokenizer."""
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type -> how struct writes one."""
MIN_PAIR_BYTES, MIN_TENSOR_BYTES, MAX_DIMENSIONS = 13, 32, 4
NAME_LIMIT = 63  # bytes of a tensor's name in llama.cpp


class BlockType(NamedTuple):
    """A tensor type: its number in a file; `nbytes` bytes hold `size` numbers that follow each other in a row."""

    number: int
    size: int
    nbytes: int


TENSOR_TYPES: dict[str, BlockType] = {
    "F32": BlockType(0, 1, 4),
    "F16": BlockType(1, 1, 2),
    "Q4_0": BlockType(2, 32, 18),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22),
    "Q5_1": BlockType(7, 32, 24),
    "Q8_0": BlockType(8, 32, 34),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144),
    "Q5_K": BlockType(13, 256, 176),
    "Q6_K": BlockType(14, 256, 210),
    "IQ4_NL": BlockType(20, 32, 18),
    "IQ4_XS": BlockType(23, 256, 136),
    "I8": BlockType(24, 1, 1),
    "I32": BlockType(26, 1, 4),
    "F64": BlockType(28, 1, 8),
    "BF16": BlockType(30, 1, 2),
    "MXFP4": BlockType(39, 32, 17),
}
TYPE_NAMES = {kind.number: name for name, kind in TENSOR_TYPES.items()}


class Value(NamedTuple):
    """A value of the metadata with its type in the file. element: the type of an array's elements."""

    kind: int
    value: Any
    element: int = -1


def uint32(value: int) -> Value:
    return Value(UINT32, int(value))


def float32(value: float) -> Value:
    return Value(FLOAT32, float(value))


def boolean(value: bool) -> Value:
    return Value(BOOL, bool(value))


def string(value: str) -> Value:
    return Value(STRING, value)


def array(element: int, values: Iterable[Any]) -> Value:
    return Value(ARRAY, list(values), element)


Metadata = Mapping[str, Value]


@dataclass(frozen=True)
class GGUFFile:
    """The header of a file. tensors: name -> type, shape (as in torch) and place of the data."""

    file: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata without its type."""
        return self.metadata[key].value if key in self.metadata else default

    @property
    def architecture(self) -> str:
        """`general.architecture`, llama.cpp's name of the model family; empty where the file names none."""
        return str(self.get("general.architecture", ""))


@dataclass(frozen=True)
class TensorData:
    """A tensor to write. shape: as in torch. chunks: yields its bytes in order."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Any]]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    kind = TENSOR_TYPES[dtype]
    return math.prod(shape) // kind.size * kind.nbytes


def align_up(size: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of the alignment."""
    return size + -size % alignment


def write_gguf(file: Path, metadata: Metadata, tensors: Mapping[str, TensorData]) -> None:
    """Write a new file and sync it; one chunk of one tensor at a time is in memory. FileExistsError if the file
    exists."""
    header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    header += [encode_string(key) + struct.pack("<I", one.kind) + encode_value(one) for key, one in metadata.items()]
    offset = 0
    for name, tensor in tensors.items():
        assert len(name.encode()) <= NAME_LIMIT, f"llama.cpp cuts the name {name} off"
        dims = tensor.shape[::-1]
        header += [encode_string(name), struct.pack(f"<I{len(dims)}QI", len(dims), *dims, number_of(tensor.dtype))]
        header.append(struct.pack("<Q", offset))
        offset += align_up(tensor.nbytes)
    with file.open("xb") as handle:
        reserve(handle, align_up(sum(map(len, header))) + offset)
        write_padded(handle, header)
        for name, tensor in tensors.items():
            written = write_padded(handle, tensor.chunks())
            assert written == tensor.nbytes, f"{name}: {written} bytes for {tensor.nbytes}"
        handle.flush()
        os.fsync(handle.fileno())


def reserve(handle: BinaryIO, nbytes: int) -> None:
    """Allocate the file's space at once, where the system can. A full disk is found before anything is written, and
    writing 500 MB takes a third of the processor time (ext4: 0.11 s against 0.35 s)."""
    try:
        os.posix_fallocate(handle.fileno(), 0, nbytes)
    except AttributeError:  # macOS, Windows
        return
    except OSError as error:
        if error.errno in DISK_REMEDIES:
            raise  # other errors: the file system has no such call, and is written without it


def number_of(dtype: str) -> int:
    return TENSOR_TYPES[dtype].number


def write_padded(handle: BinaryIO, chunks: Iterable[Any]) -> int:
    """Write all chunks, then zeros up to the alignment; return the number of bytes without the zeros."""
    size = 0
    for chunk in chunks:
        size += memoryview(chunk).nbytes
        handle.write(chunk)
    handle.write(bytes(align_up(size) - size))
    return size


def encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encode_value(one: Value) -> bytes:
    if one.kind == STRING:
        return encode_string(one.value)
    if one.kind != ARRAY:
        return struct.pack(f"<{SCALARS[one.kind]}", one.value)
    head = struct.pack("<IQ", one.element, len(one.value))
    if one.element == STRING:
        return head + b"".join(map(encode_string, one.value))
    return head + struct.pack(f"<{len(one.value)}{SCALARS[one.element]}", *one.value)


class Cursor:
    """Reads one value after another from a file's bytes. DataError, with the file's name, if they end or are
    invalid."""

    def __init__(self, file: Path, memory: Any):
        self.file, self.memory, self.at = file, memory, 0

    @property
    def left(self) -> int:
        return len(self.memory) - self.at

    def fail(self, reason: str) -> DataError:
        return DataError(f"{self.file.name}: no GGUF file, or damaged: {reason}; copy or download it again")

    def require(self, nbytes: int, what: str) -> int:
        """Return where the next `nbytes` begin, and move behind them. DataError if the file has fewer: sizes in a file
        allocate nothing before they are checked."""
        if nbytes > self.left:
            raise self.fail(f"{what} needs {nbytes:,} bytes at {self.at:,}, {self.left:,} are left")
        self.at += nbytes
        return self.at - nbytes

    def unpack(self, form: str, what: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack_from(form, self.memory, self.require(struct.calcsize(form), what))

    def count(self, least: int, what: str) -> int:
        """Read a count of items that have at least `least` bytes each."""
        (number,) = self.unpack("Q", what)
        if number * least > self.left:
            raise self.fail(f"{number:,} {what} are announced, {self.left:,} bytes are left")
        return int(number)

    def string(self, what: str) -> str:
        length = self.count(1, f"bytes of {what}")
        start = self.require(length, what)
        try:
            return bytes(self.memory[start : start + length]).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} at {start:,} is not UTF-8") from None

    def value(self, key: str) -> Value:
        (kind,) = self.unpack("I", f"type of {key}")
        if kind == STRING:
            return string(self.string(key))
        if kind in SCALARS:
            return Value(kind, self.unpack(SCALARS[kind], key)[0])
        if kind != ARRAY:
            raise self.fail(f"{key:.80} has the value type {kind}; 0 to 12 are known")
        (element,) = self.unpack("I", f"element type of {key}")
        if element != STRING and element not in SCALARS:
            raise self.fail(f"{key:.80} is an array of the value type {element}; strings and numbers are read")
        if element == STRING:
            return array(STRING, [self.string(key) for _ in range(self.count(8, f"strings of {key}"))])
        form = SCALARS[element]
        number = self.count(struct.calcsize(form), f"numbers of {key}")
        return array(element, self.unpack(f"{number}{form}", key))


def read_gguf(file: Path) -> GGUFFile:
    """Read the header of a file. DataError for one that is not regular, is cut off, is of another version, repeats a
    key or a name, or whose tensors are of an unknown type, overlap, leave gaps or have absurd shapes."""
    size = regular_file_size(file)
    refuse_lfs_pointer(file)
    if size < 24:
        raise DataError(f"{file.name}: no GGUF file: it has {size} bytes; copy or download it again")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        cursor = Cursor(file, memory)
        metadata, infos = read_header_values(cursor)
        alignment = read_alignment(cursor, metadata)
        return GGUFFile(file, metadata, place_tensors(cursor, infos, alignment))


def read_header_values(cursor: Cursor) -> tuple[dict[str, Value], list[tuple[str, str, tuple[int, ...], int]]]:
    """Read the metadata, and name, type, shape and offset of each tensor."""
    magic, version = cursor.unpack("4sI", "header")
    if magic != MAGIC:
        raise cursor.fail(f"it begins with {magic!r}, not with GGUF")
    if version not in READ_VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = f"version {swapped}, big-endian" if swapped in (1, *READ_VERSIONS) else f"version {version}"
        raise DataError(f"{cursor.file.name}: {kind}; versions 2 and 3, little-endian, are read: convert it again")
    tensors, pairs = cursor.unpack("QQ", "header")
    if pairs * MIN_PAIR_BYTES + tensors * MIN_TENSOR_BYTES > cursor.left:
        raise cursor.fail(f"{pairs:,} values and {tensors:,} tensors are announced, {cursor.left:,} bytes are left")
    metadata: dict[str, Value] = {}
    for _ in range(pairs):
        key = cursor.string("a key")
        if key in metadata:
            raise cursor.fail(f"the key {key!r:.80} appears twice")
        metadata[key] = cursor.value(key)
    return metadata, [read_tensor_info(cursor) for _ in range(tensors)]


def read_tensor_info(cursor: Cursor) -> tuple[str, str, tuple[int, ...], int]:
    name = cursor.string("a tensor's name")
    (dimensions,) = cursor.unpack("I", name)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"{name:.80} has {dimensions:,} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    *sizes, number, offset = cursor.unpack(f"{dimensions}QIQ", name)
    dtype, shape = TYPE_NAMES.get(number), tuple(reversed(sizes))
    if dtype is None:
        raise cursor.fail(f"{name:.80} has the tensor type {number}, which is unknown here")
    if any(size >= 2**40 for size in shape) or shape[-1] % TENSOR_TYPES[dtype].size:
        raise cursor.fail(f"{name:.80} has the shape {shape}, which {dtype} cannot have")
    return name, dtype, shape, offset


def read_alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    given = metadata.get(ALIGNMENT_KEY, uint32(ALIGNMENT))
    if given.kind != UINT32 or given.value < 1 or given.value > 2**20 or given.value & (given.value - 1):
        raise cursor.fail(f"{ALIGNMENT_KEY} is {given.value!r:.40}; a power of two was expected")
    return int(given.value)


def place_tensors(
    cursor: Cursor, infos: Iterable[tuple[str, str, tuple[int, ...], int]], alignment: int
) -> dict[str, StoredTensor]:
    """The place of each tensor. DataError unless each follows the one before it, within the file."""
    data = align_up(cursor.at, alignment)
    stored: dict[str, StoredTensor] = {}
    expected = 0
    for name, dtype, shape, offset in infos:
        nbytes = tensor_nbytes(dtype, shape)
        if name in stored:
            raise cursor.fail(f"the tensor {name!r:.80} appears twice")
        if offset != expected:
            raise cursor.fail(f"{name:.80} has the offset {offset:,}; the tensors before it end at {expected:,}")
        if data + offset + nbytes > len(cursor.memory):
            raise DataError(
                f"{cursor.file.name}: cut off: {name:.80} ends at byte {data + offset + nbytes:,}, the file has "
                f"{len(cursor.memory):,}; copy or download it again"
            )
        stored[name] = StoredTensor(cursor.file, dtype, shape, data + offset, nbytes)
        expected += align_up(nbytes, alignment)
    return stored
