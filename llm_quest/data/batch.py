"""TokenBatch: rows of tokens with their targets; and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

IGNORE_INDEX = -100


def pad(rows: Sequence[Sequence[int] | np.ndarray], value: int, length: int | None = None) -> np.ndarray:
    """Rows (R,T) int64, padded on the right to the longest, or to `length`."""
    padded = np.full((len(rows), max(map(len, rows)) if length is None else length), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def pad_with_positions(
    rows: Sequence[Sequence[int] | np.ndarray], starts: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Padded tokens, and positions that are -1 for padding; row r counts from starts[r], or from 0."""
    counts = [np.arange(len(row)) + start for row, start in zip(rows, starts or [0] * len(rows), strict=True)]
    return pad(rows, 0), pad(counts, -1)


@dataclass(frozen=True)
class TokenBatch:
    """tokens (B,T) int64; targets (B,T) int64, already shifted: `targets[b, t]` is to be predicted *at* t, -100 is not
    learned.

    position_ids (B,T): -1 for padding; None means plain rows that count from zero. segment_ids (B,T): which of a packed
    row's documents a token belongs to; None means one document per row. prefix: none is shared (as in `PolicyBatch`).

        tokens      <s>  a   b   <s>  c   <s>        two documents, "a b" and "c", and the beginning of a third
        targets      a   b  </s>  c  </s>  d         the last target is the true next token, in the next row
        positions    0   1   2    0   1    0
        segments     0   0   0    1   1    2
    """

    input_ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"] | None = None
    segment_ids: Int[Tensor, "B T"] | None = None
    token_count: int | None = field(default=None, repr=False, compare=False)
    prefix: ClassVar[None] = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding. Computed from `position_ids` on the host, so that reading it there costs no
        device sync."""
        if self.token_count is not None:
            return self.token_count
        return self.input_ids.numel() if self.position_ids is None else int((self.position_ids >= 0).sum())

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device (from pinned memory, without waiting for the copy)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return TokenBatch(
            move(self.input_ids),
            move(self.targets),
            None if self.position_ids is None else move(self.position_ids),
            None if self.segment_ids is None else move(self.segment_ids),
            self.num_tokens,
        )

    def slice_rows(self, start: int, stop: int) -> TokenBatch:
        """Rows start..stop-1 (views)."""
        return TokenBatch(
            self.input_ids[start:stop],
            self.targets[start:stop],
            None if self.position_ids is None else self.position_ids[start:stop],
            None if self.segment_ids is None else self.segment_ids[start:stop],
        )
