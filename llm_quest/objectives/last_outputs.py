"""What a score head gives at each row's last real token, the first that has seen everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.scope import Scope


def last_outputs(model: Any, tokens: Int[Tensor, "R T"], positions: Int[Tensor, "R T"]) -> Float[Tensor, "R N"]:
    """(rows, outputs), at least float32, wherever the padding stands."""
    h = model.hidden(tokens, Scope(positions))
    last = positions.argmax(dim=1)
    out = model.head(h[torch.arange(len(h), device=h.device), last])
    return out if out.dtype == torch.float64 else out.float()


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """tokens, positions (R,T)."""
    shape = (len(rows), max(map(len, rows)))
    tokens, positions = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    for r, row in enumerate(rows):
        tokens[r, : len(row)], positions[r, : len(row)] = row, np.arange(len(row))
    return torch.from_numpy(tokens), torch.from_numpy(positions)
