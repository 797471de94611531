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
    from llm_quest.layers.cache import Cache

Thing = TypeVar("Thing")


class Plain(Enum):
    """Masks that are known by construction, without looking at a tensor: the fused kernels run without one."""

    CAUSAL = "query i sees keys 0..i of as many keys as queries"
    ALL = "every query sees every key"


@dataclass(frozen=True)
class Band:
    """Also known without looking: query i sees keys i-window+1..i of as many keys as queries."""

    window: int


Sight = Tensor | Plain | Band
"""Who sees whom: a mask (B,T,S), or how it is known."""


class Scope:
    """What one pass may see. Build it with `Scope(positions, ...)`, or `Scope.plain(tokens)` for whole rows.

    positions: (B,T) int64, -1 for padding; within a row and segment they increase. segments: (B,T) for packed documents
    (positions restart in each). ahead: may a token look at later ones (vision)? cache: what earlier passes left.
    reach: one more than the largest position, if the caller knows it on the host; lets eager code slice the cache.
    """

    def __init__(
        self,
        positions: Tensor,
        *,
        segments: Tensor | None = None,
        ahead: bool = False,
        cache: Cache | None = None,
        records: dict[str, list[Any]] | None = None,
        reach: int | None = None,
        plain: bool = False,
    ):
        if segments is not None and cache is not None:
            raise ValueError("a cached pass reads one document per row: give segments or a cache, not both")
        if cache is not None and cache.batch != positions.shape[0]:
            raise ValueError(
                f"this pass has {positions.shape[0]} rows, but the cache was made for {cache.batch}: "
                "make another (new_cache(batch, capacity)), or bring it to size (cache.repeat, cache.keep)"
            )
        self.positions = positions
        self.segments = None if segments is None else torch.where(positions < 0, -1, segments)
        self.ahead = ahead
        self.cache = cache
        self.records = records
        self.reach = reach
        self.is_plain = plain and segments is None
        self.layer: int | None = None
        self.given: tuple[Tensor, Tensor] | None = None
        self._once: dict[Hashable, Any] = {}

    @classmethod
    def plain(
        cls,
        tokens: Tensor,
        *,
        cache: Cache | None = None,
        start: int = 0,
        ahead: bool = False,
        records: dict[str, list[Any]] | None = None,
    ) -> Scope:
        """Every row is whole: tokens (B,T) stand at start, start+1, ... Known on the host, so nothing is masked in
        vain."""
        batch, length = tokens.shape[:2]
        row = torch.arange(start, start + length, device=tokens.device)
        positions = row.expand(batch, length)
        return cls(positions, ahead=ahead, cache=cache, records=records, reach=start + length, plain=True)

    def at(self, layer: int) -> Scope:
        """The same pass as seen by one layer: its own part of the cache, its own name in the records."""
        mine = object.__new__(Scope)
        mine.__dict__.update(self.__dict__)
        mine.layer = layer
        return mine

    def giving(self, where: Tensor, vectors: Tensor) -> Scope:
        """The same pass, in which the tokens at `where` (B,T) bool mean not themselves but these vectors (K,D), in
        reading order, K = how many tokens that are: what an image encoder saw."""
        mine = self.at(self.layer)  # type: ignore[arg-type]
        mine.given = (where, vectors)
        return mine

    def fill(self, x: Tensor) -> Tensor:
        """Token embeddings x (B,T,D) with what was given in its place, before positions are added."""
        if self.given is None:
            return x
        where, vectors = self.given
        return x.masked_scatter(where[:, :, None], vectors.to(x.dtype))

    @property
    def memory(self) -> Any:
        """This layer's part of the cache; None without a cache."""
        return None if self.cache is None or self.layer is None else self.cache.layers[self.layer]

    def once(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """The value of `make()`, worked out once per pass: rotary tables, masks, slots."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def visible(self, window: int | None = None) -> Sight:
        """Which tokens of this pass each of its tokens may look at: (B,T,T) bool, or how that is known without
        looking."""
        length = self.positions.shape[1]
        if self.is_plain and (window is None or window >= length):
            return Plain.ALL if self.ahead or length == 1 else Plain.CAUSAL
        if self.is_plain and window is not None and not self.ahead:
            return Band(window)
        return self.once(("visible", window), lambda: self.sees(self.positions, self.segments, window))

    def sees(self, key_positions: Tensor, key_segments: Tensor | None, window: int | None) -> Tensor:
        """The rule itself. key_positions (B,S) -> (B,T,S) bool. Padding sees padding, so that no row is empty."""
        q, k = self.positions[:, :, None], key_positions[:, None, :]
        seen = (q < 0) == (k < 0)
        if not self.ahead:
            seen = seen & (k <= q)
        if window is not None:
            seen = seen & (q - k < window)
        if self.segments is not None and key_segments is not None:
            seen = seen & (self.segments[:, :, None] == key_segments[:, None, :])
        return seen

    def record(self, name: str, value: Any) -> None:
        """Leave a value for whoever asked (a router's loss, a tap's weights); nobody asked: nothing is kept."""
        if self.records is not None:
            self.records.setdefault(name, []).append(value)
