"""Scope: which tokens a pass may see.

**A token that is padding has position -1**: positions say both whether a token exists and where it stands, and there is
no mask argument. Visibility follows from two position vectors: the key exists, is not later than the query, lies in the
mixer's window, and is in the same segment. **A token without a position is a no-op in every mixer.**

      positions  -1  0  1  2        query 2 sees  . x x x        query 2, window 2, sees  . . x x
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class CausalMask(Enum):
    """Masks that are known by construction, without reading a tensor: the fused kernels run without one."""

    CAUSAL = "query i sees keys 0..i of as many keys as queries"
    FULL = "every query sees every key"


@dataclass(frozen=True)
class SlidingWindow:
    """A mask known by construction: query i sees keys i-window+1..i of as many keys as queries."""

    window: int


@dataclass(frozen=True)
class BlockDiagonalMask:
    """A mask known on the host, for padded rows and packed documents: the tokens of all rows, one row after the other,
    are blocks of these lengths. A query sees the keys of its own block, not later than itself and at most window-1
    before itself (None: all). is_padding: which blocks are padding, whose result is never read.

      rows  . . a b c        lengths     2 3 4 1
            d e f g .        is_padding  y n n y
    """

    lengths: tuple[int, ...]
    is_padding: tuple[bool, ...]
    window: int | None = None

    def of_block(self, length: int) -> CausalMask | SlidingWindow:
        """The mask inside a block of this length."""
        return CausalMask.CAUSAL if self.window is None or self.window >= length else SlidingWindow(self.window)


MaskSpec = Tensor | CausalMask | SlidingWindow | BlockDiagonalMask
"""An attention mask: a tensor (B,T,S) bool, or how it is known."""

NOT_CACHED = object()
SCORES_PER_BLOCK = 8192
"""A block is worth a kernel call of its own if that saves so many scores of each head."""


class PassCache(Protocol):
    """What a pass reads of a cache: its number of rows, how many positions it can hold, one part for each layer, and an
    index of each size of part."""

    batch_size: int
    capacity: int
    rope_deltas: Tensor | None

    @property
    def layers(self) -> Sequence[Any]: ...

    def slot_index(self, num_slots: int) -> Any: ...


class Scope:
    """What one pass may see. Build it with `Scope(position_ids, ...)`, or `Scope.unpadded(input_ids)` for rows without
    padding.

    position_ids: (B,T) int64, -1 for padding; within a row and segment they increase. segment_ids: (B,T) for packed
    documents (positions restart in each). bidirectional: may a token see later ones (vision)? cache: keys, values and
    states of earlier passes. records: where layers record values (`record`). max_seq_len: one more than the largest
    position, if the caller knows it on the host; eager code then slices the cache. input_ids: (B,T), set by the
    decoder, for layers that read the tokens themselves (hash embeddings, hash routers).
    """

    def __init__(
        self,
        position_ids: Tensor,
        *,
        segment_ids: Tensor | None = None,
        bidirectional: bool = False,
        cache: PassCache | None = None,
        records: dict[str, list[Any]] | None = None,
        max_seq_len: int | None = None,
        unpadded: bool = False,
    ):
        if segment_ids is not None and cache is not None:
            raise ValueError("a cached pass reads one document per row: give segment_ids or a cache, not both")
        if cache is not None and cache.batch_size != position_ids.shape[0]:
            raise ValueError(
                f"this pass has {position_ids.shape[0]} rows, but the cache was made for {cache.batch_size}: make "
                "another (new_cache(batch_size, capacity)), or change its rows (cache.batch_repeat_interleave, "
                "cache.batch_select_indices)"
            )
        self.position_ids = position_ids
        self.segment_ids = None if segment_ids is None else torch.where(position_ids < 0, -1, segment_ids)
        self.bidirectional = bidirectional
        self.cache = cache
        self.records = records
        self.max_seq_len = max_seq_len
        self.is_unpadded = unpadded and segment_ids is None
        self.layer_idx: int | None = None
        self.input_ids: Tensor | None = None
        self.visible_until: Tensor | None = None
        self.axis_positions: Tensor | None = None
        self.rows: Sequence[int] = range(position_ids.shape[0])
        self.num_prompts = position_ids.shape[0]
        self._cached_values: dict[Hashable, Any] = {}

    @classmethod
    def unpadded(
        cls,
        input_ids: Tensor,
        *,
        cache: PassCache | None = None,
        start: int = 0,
        bidirectional: bool = False,
        records: dict[str, list[Any]] | None = None,
    ) -> Scope:
        """Rows without padding: tokens (B,T) at positions start, start+1, ... This is known on the host, so that no
        mask is computed where none is needed."""
        batch_size, length = input_ids.shape[:2]
        row = torch.arange(start, start + length, device=input_ids.device)
        positions = row.expand(batch_size, length)
        return cls(
            positions,
            bidirectional=bidirectional,
            cache=cache,
            records=records,
            max_seq_len=start + length,
            unpadded=True,
        )

    def for_layer(self, layer_idx: int) -> Scope:
        """The same pass for one layer, with its own part of the cache."""
        scope = self.copy()
        scope.layer_idx = layer_idx
        return scope

    def with_input_ids(self, input_ids: Tensor) -> Scope:
        """The same pass, with its tokens (B,T)."""
        scope = self.copy()
        scope.input_ids = input_ids
        return scope

    def with_rows(self, rows: Sequence[int], num_prompts: int) -> Scope:
        """The same pass, which reads these of so many prompts (generation reads prompts of like length together)."""
        scope = self.copy()
        scope.rows, scope.num_prompts = rows, num_prompts
        return scope

    def with_axis_positions(self, axis_positions: Tensor) -> Scope:
        """The same pass with positions on several axes (axes, B, T) for rotary embeddings that read them; masks and
        caches go by `position_ids` as before."""
        scope = self.copy()
        scope.axis_positions, scope._cached_values = axis_positions, {}
        return scope

    def with_visible_until(self, visible_until: Tensor) -> Scope:
        """The same pass in which the token at position p attends to keys up to visible_until (B,T) >= p instead of
        up to p: the tokens of one image attend to each other. A window still counts from the token itself."""
        scope = self.copy()
        scope.visible_until, scope._cached_values = visible_until, {}
        return scope

    def copy(self) -> Scope:
        """A shallow copy: the values computed once per pass are shared."""
        scope = object.__new__(Scope)
        scope.__dict__.update(self.__dict__)
        return scope

    @property
    def layer_cache(self) -> Any:
        """This layer's part of the cache; None without a cache."""
        return None if self.cache is None or self.layer_idx is None else self.cache.layers[self.layer_idx]

    def cached(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of `compute()`, computed once per pass: rotary tables, masks, slots."""
        value = self._cached_values.get(key, NOT_CACHED)
        if value is NOT_CACHED:
            value = self._cached_values[key] = compute()
        return value  # type: ignore[no-any-return]

    def attention_mask(self, window: int | None = None) -> MaskSpec:
        """Which tokens of this pass each of its tokens sees: (B,T,T) bool, or how that is known."""
        length, is_causal = self.position_ids.shape[1], not self.bidirectional and self.visible_until is None
        if self.is_unpadded and (is_causal or self.bidirectional) and (window is None or window >= length):
            return CausalMask.FULL if self.bidirectional or length == 1 else CausalMask.CAUSAL
        if self.is_unpadded and window is not None and is_causal:
            return SlidingWindow(window)
        blocks = self.cached("blocks", self.find_blocks) if is_causal else None
        if blocks is not None:
            return replace(blocks, window=window)
        return self.cached(("visible", window), lambda: self.build_mask(self.position_ids, self.segment_ids, window))

    def find_blocks(self) -> BlockDiagonalMask | None:
        """The documents and the padding of this pass as blocks, where positions can be read without waiting for a
        device and the blocks save work; None: the mask is a tensor."""
        rows, length = self.position_ids.shape
        if torch.compiler.is_compiling() or rows * length**2 < SCORES_PER_BLOCK:
            return None
        if type(self.position_ids) is not Tensor or self.position_ids.device.type != "cpu":
            return None
        blocks = split_into_blocks(self.position_ids, self.segment_ids)
        if blocks is None:
            return None
        scores = sum(n * n // 2 for n, padding in zip(blocks.lengths, blocks.is_padding, strict=True) if not padding)
        return blocks if rows * length**2 - scores >= SCORES_PER_BLOCK * len(blocks.lengths) else None

    def build_mask(self, key_position_ids: Tensor, key_segment_ids: Tensor | None, window: int | None) -> Tensor:
        """The visibility rule: key positions (B,S) -> (B,T,S) bool. Padding sees padding, so that no row is empty."""
        q, k = self.position_ids[:, :, None], key_position_ids[:, None, :]
        allowed = (q < 0) == (k < 0)
        if not self.bidirectional:
            allowed = allowed & (k <= (q if self.visible_until is None else self.visible_until[:, :, None]))
        if window is not None:
            allowed = allowed & (q - k < window)
        if self.segment_ids is not None and key_segment_ids is not None:
            allowed = allowed & (self.segment_ids[:, :, None] == key_segment_ids[:, None, :])
        return allowed

    def record(self, name: str, value: Any) -> None:
        """Append a value to `records` (a router's decisions, a tap's weights); without records, do nothing."""
        if self.records is not None:
            self.records.setdefault(name, []).append(value)


def split_into_blocks(position_ids: Tensor, segment_ids: Tensor | None = None) -> BlockDiagonalMask | None:
    """The tokens (B,T) of all rows as blocks: a document is one run of consecutive positions, and padding lies between
    documents. None where a document has a gap or padding inside, so that its tokens are more than one block."""
    real = position_ids >= 0
    document = torch.zeros_like(position_ids) if segment_ids is None else segment_ids
    follows = (position_ids.diff(dim=1) == 1) & (document.diff(dim=1) == 0) & real[:, :-1]
    begins = torch.ones_like(real)
    begins[:, 1:] = ~(follows | ~(real[:, 1:] | real[:, :-1]))
    first = begins.flatten().nonzero().flatten()
    lengths = torch.cat((first, first.new_tensor([real.numel()]))).diff()
    is_padding = ~real.flatten()[first]
    owners = torch.stack((first // real.shape[1], document.flatten()[first]), dim=1)[~is_padding]
    if len(owners.unique(dim=0)) < len(owners):
        return None
    return BlockDiagonalMask(tuple(lengths.tolist()), tuple(is_padding.tolist()))
