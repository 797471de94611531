"""Scope: what may this pass see?

Two ideas keep it small. **A token that is padding has position -1**: existence and place are one tensor, and no mask
argument exists in the house. Who may look at whom *follows* from two position vectors: the key exists, is not later
than the query, lies in the mixer's window, is in the same segment. **A token without a position is a no-op in every
mixer.**

      positions  -1  0  1  2        query 2 sees  . x x x        query 2, window 2, sees  . . x x
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llm_quest.layers.kv_cache import Cache

Value = TypeVar("Value")


class CausalMask(Enum):
    """Masks that are known by construction, without looking at a tensor: the fused kernels run without one."""

    CAUSAL = "query i sees keys 0..i of as many keys as queries"
    FULL = "every query sees every key"


@dataclass(frozen=True)
class SlidingWindow:
    """Also known without looking: query i sees keys i-window+1..i of as many keys as queries."""

    window: int


MaskSpec = Tensor | CausalMask | SlidingWindow
"""Who sees whom: a mask (B,T,S), or how it is known."""


class Scope:
    """What one pass may see. Build it with `Scope(positions, ...)`, or `Scope.plain(tokens)` for whole rows.

    position_ids: (B,T) int64, -1 for padding; within a row and segment they increase. segment_ids: (B,T) for packed
    documents (positions restart in each). bidirectional: may a token look at later ones (vision)? cache: what earlier
    passes left. max_seq_len: one more than the largest position, if the caller knows it on the host; lets eager code
    slice the cache.
    """

    def __init__(
        self,
        position_ids: Tensor,
        *,
        segment_ids: Tensor | None = None,
        bidirectional: bool = False,
        cache: Cache | None = None,
        records: dict[str, list[Any]] | None = None,
        max_seq_len: int | None = None,
        unpadded: bool = False,
    ):
        if segment_ids is not None and cache is not None:
            raise ValueError("a cached pass reads one document per row: give segments or a cache, not both")
        if cache is not None and cache.batch_size != position_ids.shape[0]:
            raise ValueError(
                f"this pass has {position_ids.shape[0]} rows, but the cache was made for {cache.batch_size}: "
                "make another (new_cache(batch, capacity)), or bring it to size (cache.repeat, cache.keep)"
            )
        self.position_ids = position_ids
        self.segment_ids = None if segment_ids is None else torch.where(position_ids < 0, -1, segment_ids)
        self.bidirectional = bidirectional
        self.cache = cache
        self.records = records
        self.max_seq_len = max_seq_len
        self.is_unpadded = unpadded and segment_ids is None
        self.layer_idx: int | None = None
        self.given: tuple[Tensor, Tensor] | None = None
        self._cached_values: dict[Hashable, Any] = {}

    @classmethod
    def unpadded(
        cls,
        input_ids: Tensor,
        *,
        cache: Cache | None = None,
        start: int = 0,
        bidirectional: bool = False,
        records: dict[str, list[Any]] | None = None,
    ) -> Scope:
        """Every row is whole: tokens (B,T) stand at start, start+1, ... Known on the host, so nothing is masked in
        vain."""
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
        """The same pass as seen by one layer: its own part of the cache, its own name in the records."""
        scoped = object.__new__(Scope)
        scoped.__dict__.update(self.__dict__)
        scoped.layer_idx = layer_idx
        return scoped

    def giving(self, where: Tensor, vectors: Tensor) -> Scope:
        """The same pass, in which the tokens at `where` (B,T) bool mean not themselves but these vectors (K,D), in
        reading order, K = how many tokens that are: what an image encoder saw."""
        mine = self.for_layer(self.layer_idx)  # type: ignore[arg-type]
        mine.given = (where, vectors)
        return mine

    def fill(self, x: Tensor) -> Tensor:
        """Token embeddings x (B,T,D) with what was given in its place, before positions are added."""
        if self.given is None:
            return x
        where, vectors = self.given
        return x.masked_scatter(where[:, :, None], vectors.to(x.dtype))

    @property
    def layer_cache(self) -> Any:
        """This layer's part of the cache; None without a cache."""
        return None if self.cache is None or self.layer_idx is None else self.cache.layers[self.layer_idx]

    def cached(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of `make()`, worked out once per pass: rotary tables, masks, slots."""
        if key not in self._cached_values:
            self._cached_values[key] = compute()
        return self._cached_values[key]

    def attention_mask(self, window: int | None = None) -> MaskSpec:
        """Which tokens of this pass each of its tokens may look at: (B,T,T) bool, or how that is known without
        looking."""
        length = self.position_ids.shape[1]
        if self.is_unpadded and (window is None or window >= length):
            return CausalMask.FULL if self.bidirectional or length == 1 else CausalMask.CAUSAL
        if self.is_unpadded and window is not None and not self.bidirectional:
            return SlidingWindow(window)
        return self.cached(("visible", window), lambda: self.build_mask(self.position_ids, self.segment_ids, window))

    def build_mask(self, key_position_ids: Tensor, key_segment_ids: Tensor | None, window: int | None) -> Tensor:
        """The rule itself. key_positions (B,S) -> (B,T,S) bool. Padding sees padding, so that no row is empty."""
        q, k = self.position_ids[:, :, None], key_position_ids[:, None, :]
        allowed = (q < 0) == (k < 0)
        if not self.bidirectional:
            allowed = allowed & (k <= q)
        if window is not None:
            allowed = allowed & (q - k < window)
        if self.segment_ids is not None and key_segment_ids is not None:
            allowed = allowed & (self.segment_ids[:, :, None] == key_segment_ids[:, None, :])
        return allowed

    def record(self, name: str, value: Any) -> None:
        """Leave a value for whoever asked (a router's loss, a tap's weights); nobody asked: nothing is kept."""
        if self.records is not None:
            self.records.setdefault(name, []).append(value)
