"""ByLengthFeed: items in another order each epoch; those of a step that are of like length share a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

from llm_quest.contracts import DataShard
from llm_quest.data.instructions import require_same_data
from llm_quest.data.packing import shuffle_indices
from llm_quest.errors import UsageError

BatchT = TypeVar("BatchT", covariant=True)


class LengthGroupedDataset(Protocol[BatchT]):
    """Items by number. hash: sha256 of all of them."""

    @property
    def hash(self) -> str: ...

    def __len__(self) -> int: ...

    def item_length(self, index: int) -> int:
        """Tokens of an item's longest row."""

    def collate(self, indices: Sequence[int]) -> BatchT:
        """These items, padded to the longest."""


DatasetT = TypeVar("DatasetT", bound=LengthGroupedDataset[Any])


class LengthGroupedLoader(Generic[DatasetT]):
    """A `contracts.Feed`. batch_size: items of the global batch. micro_batch_size: at most so many in a micro-batch.
    Rank r has the r-th of `world_size` equal runs of a step's items."""

    def __init__(
        self, dataset: DatasetT, *, batch_size: int, micro_batch_size: int, seed: int, share: DataShard = DataShard()
    ):
        if batch_size % share.world_size:
            raise UsageError(
                f"{batch_size} rows cannot be shared by {share.world_size} processes; make rows a multiple of that"
            )
        self.dataset, self.batch_size, self.micro_batch_size, self.seed, self.share = (
            dataset,
            batch_size,
            micro_batch_size,
            seed,
            share,
        )
        self._epoch = lru_cache(maxsize=2)(lambda epoch: shuffle_indices(len(dataset), seed, epoch))

    def batches(self, step: int) -> list[Any]:
        """This rank's micro-batches of optimiser step `step`."""
        local_batch_size = self.batch_size // self.share.world_size
        first = step * self.batch_size + self.share.rank * local_batch_size
        places = (divmod(number, len(self.dataset)) for number in range(first, first + local_batch_size))
        chosen = sort_by_length(self.dataset, [int(self._epoch(epoch)[place]) for epoch, place in places])
        return [
            self.dataset.collate(chosen[at : at + self.micro_batch_size])
            for at in range(0, local_batch_size, self.micro_batch_size)
        ]

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on."""
        return {"feed": "by length", "data": self.dataset.hash, "rows": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; DataError if the bookmark is of other data or another order of it."""
        require_same_data(state_dict, self.state_dict())


def sort_by_length(dataset: LengthGroupedDataset[Any], indices: Sequence[int]) -> list[int]:
    """The shortest first."""
    return sorted(indices, key=lambda number: (dataset.item_length(number), number))


def length_grouped_indices(dataset: LengthGroupedDataset[Any], batch_size: int) -> list[list[int]]:
    """Numbers of all items, those of like length together: for passes in which order is nothing."""
    order = sort_by_length(dataset, range(len(dataset)))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
