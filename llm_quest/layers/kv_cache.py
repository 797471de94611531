"""Caches: what mixers keep between passes. Each mixer makes its own part, so that a hybrid model needs no cache class
of its own.

A token at position p is in slot p + 1; padding (p = -1) is in slot 0, which no query ever sees:

      position   -1   0   1   2   3             ring of 3 slots:  position  -1   0   1   2   3   4
      slot        0   1   2   3   4                               slot       0   1   2   3   1   2

A ring serves a mixer that sees at most `sliding_window` tokens; it has `max_rewind` slots more than the window, so that
up to `max_rewind` tokens can be rewound (speculative decoding). The slots of a pass are computed once per number of
slots, not per layer. Eager code reads the filled slots alone; a compiled step reads all of them (constant shapes).

Commonly got wrong: position -1 taken modulo the slots lands in a live one; a ring needs more slots than its window, or
a pass overwrites what its first query still sees; after a rewind, slots that were overwritten cannot come back; rows of
a group are repeated (0, 0, 1, 1), not tiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_quest.contracts import LayerCache
from llm_quest.layers.slot_index import SlotIndex, SlotWrite, concat_rows
from llm_quest.scope import CausalMask, MaskSpec, Scope


class Cache:
    """The cache of one model for B rows: a part for each layer and, for each number of slots, the positions in them.
    rope_deltas (B,1): what rotary positions add to `position_ids` behind images whose positions are fewer than their
    tokens (Qwen3.5); None: nothing."""

    def __init__(self, layers: Sequence[LayerCache], batch_size: int, capacity: int):
        self.layers = list(layers)
        self.batch_size = batch_size
        self.capacity = capacity
        self.slot_indices: dict[int, SlotIndex] = {}
        self.rope_deltas: Tensor | None = None

    def slot_index(self, num_slots: int) -> SlotIndex:
        """The positions in the slots of all parts of this size."""
        if num_slots not in self.slot_indices:
            self.slot_indices[num_slots] = SlotIndex(num_slots)
        return self.slot_indices[num_slots]

    def reserve(self, length: int) -> None:
        """Give memory to positions below `length` alone: zeros cost time, and a prompt whose row is copied elsewhere
        needs no more."""
        for layer in self.layers:
            if isinstance(layer, KVCache) and not layer.is_ring:
                layer.num_reserved = min(length, layer.num_slots)

    def snapshot(self, positions: Sequence[int]) -> None:
        """Row b will not be rewound below positions[b]."""
        for layer in self.layers:
            layer.snapshot(positions)

    def rewind(self, positions: Sequence[int]) -> list[int]:
        """Rewind every row b to positions[b] at most. Returns the position to which *all* layers could be rewound: feed
        the tokens from there again."""
        agreed: list[int] = []
        while agreed != (positions := list(positions)):  # a lower stand of one layer is put to all the others again
            agreed = positions
            for layer in self.layers:
                positions = layer.latest_rewind(positions)
        for layer in self.layers:
            layer.rewind(positions)
        for slot_index in self.slot_indices.values():
            slot_index.rewind(positions)
        return agreed

    def row_states(self) -> list[LayerCache | SlotIndex]:
        """Everything that is kept per row."""
        return [*self.layers, *self.slot_indices.values()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, side by side: a group of samples after one prefill."""
        self.batch_size *= repeats
        if self.rope_deltas is not None:
            self.rope_deltas = self.rope_deltas.repeat_interleave(repeats, dim=0)
        for part in self.row_states():
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        self.batch_size = indices.shape[0]
        if self.rope_deltas is not None:
            self.rope_deltas = self.rope_deltas[indices.to(self.rope_deltas.device)]
        for part in self.row_states():
            part.batch_select_indices(indices)

    def batch_concat(self, others: Sequence[Cache], order: Sequence[int]) -> None:
        """Append the rows of other caches of the same model and capacity, which are emptied; then row b is row order[b]
        of all."""
        self.join_rope_deltas(others, order)
        self.batch_size = len(order)
        for part, *same in zip(*(cache.row_states() for cache in (self, *others)), strict=True):
            part.batch_concat(same, order)

    def join_rope_deltas(self, others: Sequence[Cache], order: Sequence[int]) -> None:
        """The rows' offsets in their new order; 0 for rows without images."""
        caches = [self, *others]
        known = next((cache.rope_deltas for cache in caches if cache.rope_deltas is not None), None)
        if known is not None:
            deltas = [
                known.new_zeros(cache.batch_size, 1) if cache.rope_deltas is None else cache.rope_deltas
                for cache in caches
            ]
            self.rope_deltas = concat_rows(deltas, order)

    def nbytes(self) -> int:
        """Bytes of keys, values and states in use."""
        return sum(layer.nbytes() for layer in self.layers)


class KVCache:
    """Named tensors (B, slots+1, ...) by position: keys and values, or MLA's latent and rotary key.

    They take dtype and device from the first pass. window: how many tokens the mixer sees; None: all.
    num_reserved: how many slots get memory."""

    def __init__(self, capacity: int, window: int | None = None, max_rewind: int = 0):
        self.num_slots = capacity if window is None else min(capacity, window + max_rewind)
        self.num_reserved = self.num_slots
        self.is_ring = self.num_slots < capacity
        self.window = window
        self.slot_index: SlotIndex | None = None
        self.tensors: dict[str, Tensor] = {}

    def extend(self, scope: Scope, **new: Tensor) -> tuple[dict[str, Tensor], MaskSpec]:
        """Write new tensors (B,T,...); returns what this pass's queries may read, (B,S,...) each, and their mask.

        A pass longer than the ring's spare slots would overwrite what its first queries still need: it reads the old
        slots and the new tokens together, and writes afterwards."""
        assert scope.cache is not None, "extend is called with a cache in the scope"
        self.slot_index = slot_index = scope.cache.slot_index(self.num_slots)
        slot_write: SlotWrite = scope.cached(
            ("slot write", self.num_slots), lambda: slot_index.assign_slots(scope, self.is_ring)
        )
        length = scope.position_ids.shape[1]
        if slot_write.is_first:
            self.write(slot_write, new)
            return new, scope.attention_mask(self.window)
        if self.is_ring and self.window is not None and length > self.num_slots - self.window + 1:
            joined = {
                name: torch.cat((self.tensors[name], tensor.to(self.tensors[name])), 1) for name, tensor in new.items()
            }
            keys = torch.cat((slot_write.positions_before, scope.position_ids), dim=1)
            self.write(slot_write, new)
            return joined, scope.cached(
                ("joined", self.num_slots, self.window), lambda: scope.build_mask(keys, None, self.window)
            )
        self.write(slot_write, new)
        return self.read(scope, slot_write)

    def write(self, slot_write: SlotWrite, new: dict[str, Tensor]) -> None:
        """Copy each token's row to its slot: by a slice where the slots are one common run, else by index."""
        for name, tensor in new.items():
            length = tensor.shape[1]
            if name not in self.tensors:
                self.tensors[name] = allocate_slots(tensor, self.num_reserved + 1)
            stored = self.tensors[name]
            if slot_write.start is not None and slot_write.start + length <= self.num_slots:
                stored[:, slot_write.start + 1 : slot_write.start + 1 + length] = tensor
            else:
                if stored.requires_grad:
                    _ = stored.grad_fn  # takes an earlier slice write into the view's history; index_put_ does not
                stored.index_put_((slot_write.rows, slot_write.slots), tensor.to(stored.dtype))

    def read(self, scope: Scope, slot_write: SlotWrite) -> tuple[dict[str, Tensor], MaskSpec]:
        """The filled slots and their mask. No mask is needed for one new token after rows without gap or padding."""
        max_seq_len, length = slot_write.max_seq_len, scope.position_ids.shape[1]
        first, last = 0, self.num_slots + 1 if max_seq_len is None else min(max_seq_len, self.num_slots) + 1
        if (
            slot_write.is_contiguous
            and max_seq_len is not None
            and length == 1
            and max_seq_len <= min(self.num_slots, self.window or max_seq_len)
        ):
            return {name: tensor[:, 1:last] for name, tensor in self.tensors.items()}, CausalMask.FULL
        keys = slot_write.positions_after[:, first:last]
        mask = scope.cached(("slots", self.num_slots, self.window), lambda: scope.build_mask(keys, None, self.window))
        return {name: tensor[:, first:last] for name, tensor in self.tensors.items()}, mask

    def snapshot(self, positions: Sequence[int]) -> None:
        """Slots need no snapshot."""

    def latest_rewind(self, positions: Sequence[int]) -> list[int]:
        """Any position; but a ring has overwritten what a long rewind needs, and then raises ValueError."""
        if (
            self.is_ring
            and self.slot_index is not None
            and self.slot_index.max_positions is not None
            and self.window is not None
        ):
            for position, highest in zip(positions, self.slot_index.max_positions.tolist(), strict=True):
                if position > 0 and highest - self.num_slots >= max(position - self.window + 1, 0):
                    needed = highest - position + 1
                    raise ValueError(
                        f"a windowed cache with {self.num_slots - self.window} spare slots has overwritten what "
                        f"position {position} sees: make it with max_rewind={needed} "
                        "(new_cache(batch_size, capacity, max_rewind))"
                    )
        return list(positions)

    def rewind(self, positions: Sequence[int]) -> None:
        """Nothing to do here: the slot index forgets the positions, and what is in their slots is never seen again."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name, stored in self.tensors.items():
            self.tensors[name] = swap_head_dim(swap_head_dim(stored).repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for name, stored in self.tensors.items():
            self.tensors[name] = swap_head_dim(swap_head_dim(stored).index_select(0, indices.to(stored.device)))

    def batch_concat(self, others: Sequence[Any], order: Sequence[int]) -> None:
        for name, stored in self.tensors.items():
            parts = [stored, *(other.tensors.pop(name) for other in others)]
            self.tensors[name] = swap_head_dim(concat_rows([swap_head_dim(part) for part in parts], order))

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class NoCache:
    """The part of a block that keeps nothing between passes (a feed-forward layer alone)."""

    def snapshot(self, positions: Sequence[int]) -> None:
        """Nothing to keep."""

    def latest_rewind(self, positions: Sequence[int]) -> list[int]:
        return list(positions)

    def rewind(self, positions: Sequence[int]) -> None:
        """Nothing to forget."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """No rows."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """No rows."""

    def batch_concat(self, others: Sequence[Any], order: Sequence[int]) -> None:
        """No rows."""

    def nbytes(self) -> int:
        return 0


def extend_layer_cache(scope: Scope, window: int | None, **new: Tensor) -> tuple[dict[str, Tensor], MaskSpec]:
    """What this pass's queries may read, and its mask: the new tensors (B,T,...) alone without a cache, else with the
    tokens of earlier passes."""
    layer_cache = scope.layer_cache
    if layer_cache is None:
        return new, scope.attention_mask(window)
    return layer_cache.extend(scope, **new)


def allocate_slots(like: Tensor, num_slots: int) -> Tensor:
    """Zeros (B,slots,...) for tensors like this (B,T,...). Keys and values (B,T,G,d) are laid out head by head: a
    decode step then reads each head's slots in one run (twice as fast at batch 32 in bfloat16)."""
    batch_size, _, *rest = like.shape
    shape = (batch_size, rest[0], num_slots, rest[1]) if len(rest) == 2 else (batch_size, num_slots, *rest)
    return swap_head_dim(like.new_zeros(shape))


def swap_head_dim(x: Tensor) -> Tensor:
    """(B,S,G,d) as a view (B,G,S,d), and back; a tensor without heads as it is."""
    return x.transpose(1, 2) if x.dim() == 4 else x
