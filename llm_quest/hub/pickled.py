"""The one module that calls `torch.load`. Pickle can run code, so these files are read only when the user asks for it,
and even then with `weights_only=True`, which builds tensors and nothing else. There is no less safe fallback.

      pytorch_model.bin, a zip   | data.pkl: names, shapes, storages | data/0 | data/1 | ...     not compressed

The numbers lie in the file as they do in a safetensors file, so only the names are unpickled here; each tensor is then
read or mapped from its place, and loading takes no more memory than from safetensors."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.hub.safetensors_io import FLOAT_DTYPES, StoredTensor, refuse_lfs_pointer, regular_file_size

STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")
"""Keys of the weights in files of training code, which hold other state too."""
LOCAL_HEADER_BYTES = 30
"""Size of the local header of a zip entry, before its name and its extra field, whose lengths are its last two
numbers."""


def read_pickled(file: Path) -> dict[str, StoredTensor | Tensor]:
    """The tensors of a .bin or .pt file, by their places in it; those of a file in the older format, which is no zip,
    on the host."""
    regular_file_size(file)
    refuse_lfs_pointer(file)
    is_zip = is_whole_zip(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except Exception as error:  # of a damaged file: LookupError, struct.error, and others
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"{file.name}: holds more than tensors, or is damaged: {reason}") from None
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in STATE_DICTS if isinstance(loaded.get(key), dict)), loaded)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{file.name}: a dictionary of tensors was expected")
    tensors = {str(name): tensor.detach() for name, tensor in loaded.items()}
    return places_in_zip(file, tensors) if is_zip else dict(tensors)


def is_whole_zip(file: Path) -> bool:
    """Whether this is a zip. DataError for one whose entries are compressed or claim more bytes than it has: torch
    writes none, and unpacked they may be of any size."""
    try:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, struct.error) as error:
        raise DataError(f"{file.name}: a damaged zip ({error}); copy or download it again") from None
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise DataError(
            f"{file.name}: holds compressed entries, or fewer bytes than they claim, which torch.save never writes; "
            "load and save it again with torch, or ask for safetensors"
        )
    return True


def places_in_zip(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor | Tensor]:
    """Locate each mapped tensor in the file. The mapping begins where the file does; every storage is one entry of the
    zip, and if these do not agree, the tensors are returned as they are."""
    starts = {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}
    entries = entry_starts(file)
    if not starts or not entries:
        return dict(tensors)
    begin = min(starts) - min(entries)
    if {start - begin for start in starts} != entries:
        return dict(tensors)
    names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
    stored: dict[str, StoredTensor | Tensor] = {}
    for name, tensor in tensors.items():
        fits = tensor.numel() and tensor.is_contiguous() and tensor.dtype in names
        place: Any = (file, names.get(tensor.dtype), tuple(tensor.shape), tensor.data_ptr() - begin, tensor.nbytes)
        stored[name] = StoredTensor(*place) if fits else tensor
    return stored


def entry_starts(file: Path) -> set[int]:
    """The offsets of the storages in the file."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as handle:
        starts = set()
        for entry in archive.infolist():
            if "/data/" in entry.filename and entry.file_size and entry.compress_type == zipfile.ZIP_STORED:
                handle.seek(entry.header_offset + LOCAL_HEADER_BYTES - 4)
                starts.add(entry.header_offset + LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", handle.read(4))))
    return starts
