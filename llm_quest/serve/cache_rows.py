"""The caches of running requests as rows of one batch. A request joins and leaves by copying its own row; the rows of
the others stay where they are.

      rows   0 1 2 3        request 1 leaves        0 3 2        a request joins        0 3 2 4
                            (the last row takes its place)

Every slot of the batch has the same capacity. Memory grows with the longest text (rings, which are small, have theirs
at once): zeros for the whole capacity would cost more than the prompts that are read into them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.layers.kv_cache import Cache, KVCache, allocate_slots
from llm_quest.layers.slot_index import SlotIndex
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

MIN_RESERVED = 128
"""num_reserved at first."""


@dataclass(frozen=True)
class CacheRow:
    """What the layers keep of one text: a part for each layer, whose keys and values are the filled slots alone.
    length: the number of positions. rope_deltas: see `Cache`; None where there were no images."""

    length: int
    layers: Sequence[Any]
    slot_indices: dict[int, SlotIndex]
    rope_deltas: Tensor | None = None

    def clone(self) -> CacheRow:
        """A copy that no later pass changes."""
        layers = [copy_slots(layer) if isinstance(layer, KVCache) else layer for layer in self.layers]
        return CacheRow(self.length, layers, self.slot_indices)

    def nbytes(self) -> int:
        """Bytes of keys, values and states."""
        return sum(layer.nbytes() for layer in self.layers)

    def to_cache(self, model: Decoder, capacity: int, length: int) -> Cache:
        """A cache of one row, which holds this text, with memory for `length` positions."""
        cache: Cache = model.new_cache(1, capacity)
        layers: list[Any] = cache.layers
        cache.slot_indices = {size: copy.copy(index) for size, index in self.slot_indices.items()}
        for number, layer in enumerate(self.layers):
            cache_layer: Any = copy.copy(layer)
            if isinstance(cache_layer, KVCache):
                cache_layer.num_reserved = cache_layer.num_slots if cache_layer.is_ring else max(length, self.length)
                cache_layer.tensors = {
                    name: widen(part, cache_layer.num_reserved) for name, part in cache_layer.tensors.items()
                }
                cache_layer.slot_index = cache.slot_indices.get(cache_layer.num_slots)
            layers[number] = cache_layer
        return cache


def read_row(cache: Cache, row: int, length: int) -> CacheRow:
    """Row `row` of a cache, in which it has positions 0 to length-1. Keys and values are views."""
    index = torch.tensor([row])
    slot_indices = {size: one_row_index(one, index, length) for size, one in cache.slot_indices.items()}
    layers: list[Any] = []
    for layer in cache.layers:
        row_layer: Any = copy.copy(layer)
        if isinstance(row_layer, KVCache):
            filled = min(length, row_layer.num_slots) + 1
            row_layer.tensors = {name: tensor[row : row + 1, :filled] for name, tensor in row_layer.tensors.items()}
            row_layer.slot_index = slot_indices.get(row_layer.num_slots)
        else:
            row_layer.batch_select_indices(index)
        layers.append(row_layer)
    deltas = None if cache.rope_deltas is None else cache.rope_deltas[row : row + 1]
    return CacheRow(length, layers, slot_indices, deltas)


def one_row_index(slot_index: SlotIndex, row: Tensor, length: int) -> SlotIndex:
    """The index of one row. A text without a gap fills the slots from the first one on."""
    one = copy.copy(slot_index)
    one.batch_select_indices(row)
    one.is_contiguous, one.run_length = True, length
    return one


def copy_slots(layer: KVCache) -> KVCache:
    """The same keys and values in memory of their own."""
    copied = copy.copy(layer)
    copied.tensors = {name: widen(part, part.shape[1] - 1) for name, part in copied.tensors.items()}
    return copied


def widen(part: Tensor, num_slots: int) -> Tensor:
    """A copy of (1,filled,...) with num_slots + 1 slots."""
    larger = allocate_slots(part, num_slots + 1)
    larger[:, : part.shape[1]] = part
    return larger


class SlotCache:
    """A cache of at most `max_rows` texts, each of at most `capacity` positions. lengths: of each row. num_reserved:
    for so many positions of each row there is memory."""

    def __init__(self, model: Decoder, max_rows: int, capacity: int):
        self.model, self.max_rows, self.capacity = model, max_rows, capacity
        self.num_reserved = min(MIN_RESERVED, capacity)
        self.buffers: dict[tuple[int, str], Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all rows; their memory is used again."""
        self.cache: Cache = self.model.new_cache(1, self.capacity)
        self.cache.batch_size = 0
        self.lengths: list[int] = []

    def join(self, row: CacheRow) -> None:
        """Append a text, as the last row."""
        self.reserve(row.length)
        first, order = not self.lengths, range(len(self.lengths) + 1)
        self.join_rope_deltas(row.rope_deltas)
        self.lengths.append(row.length)
        self.cache.batch_size = len(self.lengths)
        for number, (layer, new) in enumerate(zip(self.cache.layers, row.layers, strict=True)):
            if isinstance(new, KVCache):
                self.write_slots(number, new, len(self.lengths) - 1)
            elif first:
                self.cache.layers[number] = copy.copy(new)
            else:
                layer.batch_concat([copy.copy(new)], order)
        for size, index in row.slot_indices.items():
            if first:
                self.cache.slot_indices[size] = copy.copy(index)
            else:
                self.cache.slot_indices[size].batch_concat([index], order)
        self.set_views()

    def join_rope_deltas(self, deltas: Tensor | None) -> None:
        """Append the offset of a new row; 0 for rows without images."""
        known = self.cache.rope_deltas
        if (like := known if deltas is None else deltas) is not None:
            before = like.new_zeros(len(self.lengths), 1) if known is None else known
            self.cache.rope_deltas = torch.cat((before, like.new_zeros(1, 1) if deltas is None else deltas))

    def write_slots(self, number: int, layer: KVCache, row: int) -> None:
        """Copy the filled slots of layer `number` to a row of its buffers."""
        for name, part in layer.tensors.items():
            if (number, name) not in self.buffers:
                like = part[:1].expand(self.max_rows, *part.shape[1:])
                num_slots = layer.num_slots if layer.is_ring else self.num_reserved
                self.buffers[number, name] = allocate_slots(like, num_slots + 1)
            self.buffers[number, name][row, : part.shape[1]] = part[0]

    def reserve(self, length: int) -> None:
        """Memory for texts of this length: at least twice as much as there was, so that few copies are made."""
        if length <= self.num_reserved:
            return
        self.num_reserved = min(max(length, 2 * self.num_reserved), self.capacity)
        for (number, name), buffer in self.buffers.items():
            if not self.kv_layer(number).is_ring:
                larger = allocate_slots(buffer, self.num_reserved + 1)
                larger[: len(self.lengths), : buffer.shape[1]] = buffer[: len(self.lengths)]
                self.buffers[number, name] = larger
        self.set_views()

    def set_views(self) -> None:
        """The layers see the rows in use."""
        for (number, name), buffer in self.buffers.items():
            self.kv_layer(number).tensors[name] = buffer[: len(self.lengths)]

    def kv_layer(self, number: int) -> KVCache:
        layer = self.cache.layers[number]
        assert isinstance(layer, KVCache), "only such layers have buffers"
        return layer

    def leave(self, row: int) -> list[int]:
        """Remove a row; the last one takes its place. Returns the old number of each row that is left."""
        last = len(self.lengths) - 1
        order = [*range(last)]
        if row != last:
            order[row] = last
            for (number, _), buffer in self.buffers.items():
                filled = min(self.lengths[last], self.kv_layer(number).num_slots) + 1
                buffer[row, :filled] = buffer[last, :filled]
        self.lengths = [self.lengths[old] for old in order]
        if not order:
            self.clear()
            return order
        self.cache.batch_size = last
        if self.cache.rope_deltas is not None:
            self.cache.rope_deltas = self.cache.rope_deltas[torch.tensor(order, device=self.cache.rope_deltas.device)]
        for part in other_states(self.cache):
            part.batch_select_indices(torch.tensor(order))
        self.set_views()
        return order

    def row(self, number: int) -> CacheRow:
        """A text of the batch; a view, until the next pass."""
        return read_row(self.cache, number, self.lengths[number])

    def decode(self, tokens: Sequence[int], device: torch.device) -> Float[Tensor, "B V"]:
        """Feed every row its next token; the logits after it."""
        reach, same = max(self.lengths) + 1, len(set(self.lengths)) == 1
        self.reserve(reach)
        for index in self.cache.slot_indices.values():  # no row has a gap: the mask is left out where lengths are equal
            index.is_contiguous, index.run_length = same, min(self.lengths)
        positions = torch.tensor(self.lengths, device=device)[:, None]
        scope = Scope(positions, cache=self.cache, max_seq_len=reach, unpadded=same)
        logits = self.model(torch.tensor(tokens, device=device)[:, None], scope)[:, -1]
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    @property
    def use(self) -> float:
        """The share of all positions that is filled."""
        return sum(self.lengths) / (self.max_rows * self.capacity)


def other_states(cache: Cache) -> Iterable[Any]:
    """What is kept per row besides keys and values."""
    yield from (layer for layer in cache.layers if not isinstance(layer, KVCache))
    yield from cache.slot_indices.values()
