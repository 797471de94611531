"""Which slot each token of a pass gets, and the position that each slot holds (the picture: `layers/kv_cache.py`).

Commonly got wrong: caches that are joined in another order than they were filled carry their positions along, or a row
reads another row's past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_quest.scope import Scope


@dataclass(frozen=True)
class SlotWrite:
    """Where one pass writes. rows (B,1), slots (B,T): the place of each token; positions_before, positions_after (B,
    slots+1): the positions in the slots before and after the pass; start: the common slot of the first token of an
    unpadded pass, where it is known; is_first: the slots were empty before; is_contiguous: the rows are 0..n without
    gap or padding."""

    rows: Tensor
    slots: Tensor
    positions_before: Tensor
    positions_after: Tensor
    start: int | None
    is_first: bool
    is_contiguous: bool
    max_seq_len: int | None


class SlotIndex:
    """The positions (B, slots+1) in the slots of all parts of this size; -1 where a slot is free.

    is_contiguous: rows fill slots 1..run_length without gap or padding. max_positions (B,): the latest position that a
    ring has ever held; what is `num_slots` below it is overwritten for good, also after a rewind."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.positions: Tensor | None = None
        self.max_positions: Tensor | None = None
        self.is_contiguous = True
        self.run_length = 0

    def assign_slots(self, scope: Scope, ring: bool) -> SlotWrite:
        """Assign slots to this pass's tokens and record their positions."""
        positions, is_first = scope.position_ids, self.positions is None
        max_seq_len = host_max_seq_len(scope)
        if max_seq_len is not None and max_seq_len > self.num_slots and not ring:
            raise ValueError(
                f"this pass reaches position {max_seq_len - 1}, but the cache was made for {self.num_slots} positions: "
                "make it larger (new_cache(batch_size, capacity)) or let the window slide"
            )
        if self.positions is None:
            self.positions = positions.new_full((positions.shape[0], self.num_slots + 1), -1)
        start = max_seq_len - positions.shape[1] if scope.is_unpadded and max_seq_len is not None else None
        # asks the pass first: a compiled step, whose start is a tensor, is then the same graph after any earlier pass
        self.is_contiguous = start is not None and self.is_contiguous and start <= self.run_length
        if self.is_contiguous and max_seq_len is not None:
            self.run_length = max(self.run_length, max_seq_len)
        before = self.positions
        slots = ring_slots(positions, self.num_slots) if ring else positions + 1
        self.positions = before.scatter(1, slots, torch.where(slots == 0, -1, positions))
        if ring:
            latest = positions.amax(dim=1)
            self.max_positions = latest if self.max_positions is None else torch.maximum(self.max_positions, latest)
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        return SlotWrite(rows, slots, before, self.positions, start, is_first, self.is_contiguous, max_seq_len)

    def rewind(self, positions: Sequence[int]) -> None:
        if self.positions is not None:
            limit = torch.tensor(list(positions), device=self.positions.device)[:, None]
            self.positions = torch.where(self.positions >= limit, -1, self.positions)
            self.is_contiguous = self.is_contiguous and len(set(positions)) == 1
            self.run_length = min(self.run_length, *positions)
            if self.max_positions is not None:
                self.max_positions = torch.where(limit[:, 0] == 0, -1, self.max_positions)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, dim=0)
        if self.max_positions is not None:
            self.max_positions = self.max_positions.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.positions is not None:
            self.positions = self.positions[indices.to(self.positions.device)]
        if self.max_positions is not None:
            self.max_positions = self.max_positions[indices.to(self.max_positions.device)]

    def batch_concat(self, others: Sequence[Any], order: Sequence[int]) -> None:
        parts = [self, *others]
        if self.positions is not None:
            self.positions = concat_rows([part.positions for part in parts], order)
        if self.max_positions is not None:
            self.max_positions = concat_rows([part.max_positions for part in parts], order)
        self.is_contiguous = all(part.is_contiguous for part in parts) and len({part.run_length for part in parts}) == 1
        self.run_length = min(part.run_length for part in parts)


def concat_rows(parts: Sequence[Tensor | None], order: Sequence[int]) -> Tensor:
    """The rows of all parts as one tensor, of which row b is row order[b] of the parts one after the other."""
    rows = torch.cat([part for part in parts if part is not None])
    return rows if list(order) == sorted(order) else rows[torch.tensor(order, device=rows.device)]


def host_max_seq_len(scope: Scope) -> int | None:
    """One more than the largest position, as a number on the host; eager code reads the tensor if the caller did not
    say."""
    if scope.max_seq_len is not None or torch.compiler.is_compiling():
        return scope.max_seq_len
    return int(scope.position_ids.max()) + 1


def ring_slots(positions: Tensor, num_slots: int) -> Tensor:
    """Slot (B,T) of each token in a ring. Tokens that later ones of the same pass would overwrite go to slot 0."""
    stays = (positions >= 0) & (positions > positions.amax(dim=1, keepdim=True) - num_slots)
    return torch.where(stays, positions % num_slots + 1, 0)
