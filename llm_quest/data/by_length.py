"""ByLengthFeed: items in another order each epoch; those of a step that are of like length share a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

from llm_quest.contracts import Share
from llm_quest.data.instructions import require_same
from llm_quest.data.packing import shuffled
from llm_quest.errors import UsageError

Made = TypeVar("Made", covariant=True)


class Source(Protocol[Made]):
    """Items by number. hash: sha256 of all of them."""

    @property
    def hash(self) -> str: ...

    def __len__(self) -> int: ...

    def size(self, number: int) -> int:
        """Tokens of an item's longest row."""

    def batch(self, numbers: Sequence[int]) -> Made:
        """These items, padded to the longest."""


Things = TypeVar("Things", bound=Source[Any])


class ByLengthFeed(Generic[Things]):
    """A `contracts.Feed`. rows: items of the global batch. micro_rows: at most so many in a micro-batch. Rank r has the
    r-th of `world` equal runs of a step's items."""

    def __init__(self, source: Things, *, rows: int, micro_rows: int, seed: int, share: Share = Share()):
        if rows % share.world:
            raise UsageError(f"{rows} rows cannot be shared by {share.world} processes; make rows a multiple of that")
        self.source, self.rows, self.micro_rows, self.seed, self.share = source, rows, micro_rows, seed, share
        self._epoch = lru_cache(maxsize=2)(lambda epoch: shuffled(len(source), seed, epoch))

    def at(self, step: int) -> list[Any]:
        """This rank's micro-batches of optimiser step `step`."""
        mine = self.rows // self.share.world
        first = step * self.rows + self.share.rank * mine
        places = (divmod(number, len(self.source)) for number in range(first, first + mine))
        chosen = in_order(self.source, [int(self._epoch(epoch)[place]) for epoch, place in places])
        return [self.source.batch(chosen[at : at + self.micro_rows]) for at in range(0, mine, self.micro_rows)]

    def bookmark(self) -> dict[str, Any]:
        """What the order depends on."""
        return {"feed": "by length", "data": self.source.hash, "rows": self.rows, "seed": self.seed}

    def resume(self, bookmark: dict[str, Any]) -> None:
        """Nothing to restore; DataError if the bookmark is of other data or another order of it."""
        require_same(bookmark, self.bookmark())


def in_order(source: Source[Any], numbers: Sequence[int]) -> list[int]:
    """The shortest first."""
    return sorted(numbers, key=lambda number: (source.size(number), number))


def all_of(source: Source[Any], at_once: int) -> list[list[int]]:
    """Numbers of all items, those of like length together: for passes in which order is nothing."""
    order = in_order(source, range(len(source)))
    return [order[at : at + at_once] for at in range(0, len(order), at_once)]
