"""Memory-mapped weights: a parameter is its part of the file, mapped copy-on-write, in place of a copy.

      file   | header | down | gate | up | k | o | q | v | ...        gate_up = [gate; up] lies there as we need it,
                               \________/                             qkv = [q; k; v] does not, and is read

This needs a file with our order and dtype: one tensor, several published tensors one behind the other, or a transposed
one (then the parameter is a transposed view; only in float32, for the products of a decode step are a third slower on
transposed matrices in bfloat16, and no slower in float32). Writes to it, an optimizer's say, go to memory of this
process; the file never changes. `safetensors_io.read_into` is the definition, and reads all other tensors.

A file that is *replaced* by renaming another over it (as `save` does) or deleted lives on under the mapping. But
reading numbers of a file that was truncated in place ends the process (SIGBUS): true of every program that maps
safetensors files. Windows allows no renaming over a mapped file; there nothing is mapped.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from llm_quest.errors import DataError
from llm_quest.hub.safetensors_io import FLOAT_DTYPES, StoredTensor
from llm_quest.hub.weight_map import WeightView
from llm_quest.tensor_files import ALIGNMENT


@cache
def can_replace_mapped_files() -> bool:
    """Whether this system lets a file be renamed over a mapped one, tried once."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            old, new = Path(folder) / "old", Path(folder) / "new"
            old.write_bytes(b"old")
            new.write_bytes(b"new")
            mapped = map_file(old)
            try:
                os.replace(new, old)
            finally:
                mapped.close()
    except OSError:  # or no temporary files can be made
        return False
    return True


def memory_map_parameters(
    parameters: Mapping[str, nn.Parameter],
    weight_views: Mapping[str, WeightView],
    sources: Mapping[str, object],
    dtypes: Mapping[str, torch.dtype],
    *,
    aligned: bool = False,
) -> dict[str, Tensor]:
    """Map the parameters that can be mapped: tensors over the files. sources: stored name -> where its numbers are.
    dtypes: of each parameter. aligned: only those in row order that begin at a multiple of 64 bytes."""
    parts: dict[str, list[tuple[StoredTensor, WeightView]]] = defaultdict(list)
    for name, place in weight_views.items():
        source = sources[name]
        if isinstance(source, StoredTensor) and FLOAT_DTYPES.get(source.dtype) == dtypes[place.parameter]:
            parts[place.parameter].append((source, place))
    if not parts or not can_replace_mapped_files():
        return {}
    try:
        maps = {
            file: map_file(file)
            for file in {stored.file for part_sources in parts.values() for stored, _ in part_sources}
        }
    except OSError:  # a file system that maps nothing, or no address space left: everything is read
        return {}
    mapped = {
        path: map_parameter(parameters[path], part_sources, maps, aligned) for path, part_sources in parts.items()
    }
    return {path: tensor for path, tensor in mapped.items() if tensor is not None}


def map_file(file: Path) -> mmap.mmap:
    """Map a file copy-on-write."""
    with file.open("rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)


def map_parameter(
    parameter: nn.Parameter,
    parts: Sequence[tuple[StoredTensor, WeightView]],
    maps: Mapping[Path, mmap.mmap],
    aligned: bool,
) -> Tensor | None:
    """Map a parameter as a tensor over its file; None if the file holds it in another order."""
    first = min((stored for stored, _ in parts), key=lambda stored: stored.start)
    dtype = FLOAT_DTYPES[first.dtype]
    nbytes = sum(stored.nbytes for stored, _ in parts if stored.file == first.file)
    if nbytes != parameter.numel() * dtype.itemsize or not nbytes or first.start % dtype.itemsize:
        return None
    if any(place.merged is not None for _, place in parts):
        return None
    if len(maps[first.file]) < first.start + nbytes:
        raise DataError(f"{first.file.name}: became shorter while it was read; load it again once nobody writes to it")
    memory = torch.frombuffer(maps[first.file], dtype=dtype, count=parameter.numel(), offset=first.start)
    transposed = any(not place.view(parameter).is_contiguous() for _, place in parts)
    if (transposed and dtype != torch.float32) or (aligned and (transposed or memory.data_ptr() % ALIGNMENT)):
        return None
    tensor = reshape_memory(memory, parameter, transposed=transposed)
    begin = memory.data_ptr() - first.start
    return (
        tensor if all(reads_stored_order(place.view(tensor), begin + stored.start) for stored, place in parts) else None
    )


def reshape_memory(memory: Tensor, parameter: nn.Parameter, *, transposed: bool) -> Tensor:
    """Flat memory in the parameter's shape; transposed: its last two dimensions are stored the other way round."""
    if not transposed:
        return memory.view(parameter.shape)
    *outer, rows, columns = parameter.shape
    return memory.view(*outer, columns, rows).mT


def reads_stored_order(view: Tensor, address: int) -> bool:
    """Whether this view of the parameter reads the numbers from an address on, in their order."""
    return view.is_contiguous() and view.data_ptr() == address
