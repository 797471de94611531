"""ShardedLoader: the batches of every source whose rows are a function of (seed, row number).

      step s, 8 rows, 2 processes, micro-batches of 3

      row numbers   8s 8s+1 8s+2 | 8s+3       8s+4 8s+5 8s+6 | 8s+7
                    rank 0                    rank 1

Rows are numbered from the beginning of training on. There is no state: the step alone says where the loader is, so that
a run resumes anywhere, and the rows of a step are the same for every number of processes and every micro-batch size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from llm_quest.contracts import DataShard
from llm_quest.errors import DataError, UsageError

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
BatchT_co = TypeVar("BatchT_co", covariant=True)


class RowSource(Protocol[BatchT_co]):
    """The rows of training, by their number."""

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> Sequence[BatchT_co]:
        """Cut these rows into batches of at most `micro_batch_size`. The source may order them by length within the
        step."""

    def fingerprint(self) -> Mapping[str, Any]:
        """What the rows depend on, apart from seed and batch size: JSON that identifies data and order."""


@runtime_checkable
class TokenBudgetSource(Protocol):
    """A `RowSource` whose micro-batches hold as many rows as a number of tokens allows for."""

    def limit_micro_batch_size(self, rows: range, micro_batch_size: int, seed: int) -> int:
        """At most `micro_batch_size`. rows: of the whole step, not of one process: what a process derived from its own
        rows would give it another number of micro-batches than the others, which wait for each other in each."""


SourceT = TypeVar("SourceT", bound=RowSource[Any])


class ShardedLoader(Generic[SourceT]):
    """A `contracts.Loader`. batch_size: rows of a step, over all processes; micro_batch_size: at most so many at once.
    Of the rows of a step, rank r has the r-th of `world_size` equal runs."""

    def __init__(
        self, source: SourceT, *, batch_size: int, micro_batch_size: int, seed: int, shard: DataShard | None = None
    ):
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        if wrong := [f"{name} is {value}" for name, value in sizes.items() if value < 1]:
            raise UsageError(f"{', '.join(wrong)}; expected at least 1")
        self.shard = shard or DataShard()
        if batch_size % self.shard.world_size:
            raise UsageError(
                f"{batch_size} rows cannot be shared by {self.shard.world_size} processes; "
                "make the number of rows a multiple of that"
            )
        self.source, self.batch_size, self.micro_batch_size, self.seed = source, batch_size, micro_batch_size, seed

    def batches(self, step: int) -> list[Any]:
        """The micro-batches of this rank at optimizer step `step`."""
        local_batch_size = self.batch_size // self.shard.world_size
        step_rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        first = self.shard.rank * local_batch_size
        size = self.micro_batch_size
        if isinstance(self.source, TokenBudgetSource):
            size = self.source.limit_micro_batch_size(step_rows, size, self.seed)
        return list(self.source.micro_batches(step_rows[first : first + local_batch_size], size, self.seed))

    def state_dict(self) -> dict[str, Any]:
        """What data and order depend on."""
        return {**self.source.fingerprint(), "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing to restore. DataError if the state is of other data, or of another order of them."""
        here = self.state_dict()
        changed = [
            f"{name} was {state_dict.get(name)}, is {here[name]}" for name in here if state_dict.get(name) != here[name]
        ]
        if changed:
            raise DataError(f"the checkpoint belongs to another stream of data: {'; '.join(changed)}; start a new run")


class Dataset(Protocol[BatchT_co]):
    """Items by their index, and their collation into a batch."""

    def __len__(self) -> int: ...

    def collate(self, indices: Sequence[int]) -> BatchT_co:
        """Make a batch of these items."""


class SizedDataset(Dataset[BatchT_co], Protocol):
    """A dataset whose items have a length in tokens."""

    def item_length(self, index: int) -> int:
        """Tokens of the longest row of an item."""


def shuffled_batches(dataset: Dataset[BatchT_co], rows: range, micro_batch_size: int, seed: int) -> list[BatchT_co]:
    """Batches in which every item comes once an epoch, in another order each epoch."""
    return collate_in_parts(dataset, epoch_indices(len(dataset), seed, rows), micro_batch_size)


def length_grouped_batches(
    dataset: SizedDataset[BatchT_co], rows: range, micro_batch_size: int, seed: int
) -> list[BatchT_co]:
    """The micro-batches of a step where the rows of a step that are of similar length share a micro-batch."""
    return collate_in_parts(dataset, sort_by_length(dataset, epoch_indices(len(dataset), seed, rows)), micro_batch_size)


def collate_in_parts(dataset: Dataset[BatchT_co], indices: Sequence[int], batch_size: int) -> list[BatchT_co]:
    """Collate these items in batches."""
    return [dataset.collate(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]


def sort_by_length(dataset: SizedDataset[Any], indices: Iterable[int]) -> list[int]:
    """Indices sorted by length, the shortest first."""
    return sorted(indices, key=lambda index: (dataset.item_length(index), index))


def length_grouped_indices(dataset: SizedDataset[Any], batch_size: int) -> list[list[int]]:
    """The indices of all items in batches of like length, for evaluation, where order means nothing."""
    order = sort_by_length(dataset, range(len(dataset)))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def epoch_indices(size: int, seed: int, rows: Iterable[int]) -> list[int]:
    """The item behind each row number, where an epoch is a permutation of `size` items."""
    return [int(_epoch_order(size, seed, number // size)[number % size]) for number in rows]


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    return shuffle_indices(size, seed, epoch)


def shuffle_indices(size: int, *key: int) -> np.ndarray:
    """A permutation of 0..size-1 that depends on the key alone: the same with every version of every library. Each
    index gets 64 bits by the splitmix64 finalizer (Steele, Lea & Flood 2014), and they are sorted by them."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in key:
            state = _splitmix64(state + np.uint64(part % 2**64) * GOLDEN_GAMMA + np.uint64(1))
        bits = _splitmix64(np.arange(size, dtype=np.uint64) * GOLDEN_GAMMA + state)
    return np.argsort(bits, kind="stable")


def philox_uniforms(seed: int, number: int) -> np.ndarray:
    """8 float32 in 0..1 that depend on seed and number alone (Philox, a counter-based generator)."""
    raw = np.random.Philox(key=seed % 2**64, counter=number).random_raw(8)
    return ((raw >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def _splitmix64(bits: Any) -> Any:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class HasWeight(Protocol):
    """Anything that is seen `weight` times in an epoch."""

    @property
    def weight(self) -> float: ...


Weighted = TypeVar("Weighted", bound=HasWeight)


def repeat_by_weight(items: Iterable[Weighted]) -> list[Weighted]:
    """The items of an epoch: those of weight 2 twice, of weight 1.5 once and twice in turn, of weight 0.5 every second
    one."""
    before: Counter[float] = Counter()
    repeated: list[Weighted] = []
    for item in items:
        number = before[item.weight]
        before[item.weight] += 1
        repeated += [item] * (math.floor((number + 1) * item.weight) - math.floor(number * item.weight))
    return repeated
