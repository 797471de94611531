"""The one module that calls `torch.load`. Pickle can run code, so these files are read only when the user asks for it,
and even then with `weights_only=True`, which builds tensors and nothing else. Nothing falls back to anything less
safe."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.hub.safetensors_io import refuse_lfs_pointer, regular_file_size


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .pt file, on the host."""
    regular_file_size(file)
    refuse_lfs_pointer(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        raise DataError(f"{file.name}: holds more than tensors, or is damaged: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{file.name}: a dictionary of tensors was expected")
    return {str(name): tensor.detach() for name, tensor in loaded.items()}
