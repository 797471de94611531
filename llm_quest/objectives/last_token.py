"""Outputs of a score head at the last real token of each row, which attends to the whole row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.data.batch import pad_with_positions
from llm_quest.scope import Scope


def last_token_outputs(
    model: Any, input_ids: Int[Tensor, "R T"], position_ids: Int[Tensor, "R T"]
) -> Float[Tensor, "R N"]:
    """Outputs (rows, outputs), at least float32; padding may be on either side."""
    h = model.hidden_states(input_ids, Scope(position_ids))
    last = position_ids.argmax(dim=1)
    out = model.head(h[torch.arange(len(h), device=h.device), last])
    return out if out.dtype == torch.float64 else out.float()


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """input_ids, position_ids (R,T)."""
    input_ids, position_ids = pad_with_positions(rows)
    return torch.from_numpy(input_ids), torch.from_numpy(position_ids)
