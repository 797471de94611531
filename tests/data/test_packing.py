"""The feed: a function of (seed, step), nothing lost, nothing twice, no false end, no target across a boundary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.contracts import DataShard
from llm_quest.data.batch import TokenBatch
from llm_quest.data.loader import ShardedLoader, shuffle_indices
from llm_quest.data.packing import EpochOrder, PackedDocuments
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.errors import DataError, UsageError

START, END = 1, 2
DOCUMENTS = st.lists(st.lists(st.integers(3, 50), max_size=12), min_size=1, max_size=8)


def tokens_of(documents: list[list[int]]) -> TokenizedDocuments:
    return TokenizedDocuments.from_token_lists(documents, vocab_size=51, start=START, end=END)


def rows_of(documents: list[list[int]], sequence_length: int = 4) -> PackedDocuments:
    return PackedDocuments(tokens_of(documents), sequence_length)


def loader_of(documents: list[list[int]], *, sequence_length: int = 4, **changes) -> ShardedLoader[PackedDocuments]:
    sizes = {"batch_size": 4, "micro_batch_size": 4, "seed": 0}
    return ShardedLoader(rows_of(documents, sequence_length), **(sizes | changes))


def join_micro_batches(batches: list[TokenBatch]) -> list[torch.Tensor]:
    """Columns of all micro-batches as one."""
    names = ("input_ids", "targets", "position_ids", "segment_ids")
    return [torch.cat([getattr(b, name) for b in batches]) for name in names if getattr(batches[0], name) is not None]


def are_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(DOCUMENTS, st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_shows_every_input_once_with_its_true_next_token(documents: list[list[int]], length: int, seed: int):
    feed = rows_of(documents, length)
    for epoch in (0, 1):
        first = epoch * feed.rows_per_epoch
        batch = feed.collate(range(first, first + feed.rows_per_epoch), seed)
        shown = sorted(
            pair
            for pair in zip(batch.input_ids.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
            if pair[1] >= 0
        )
        true = sorted(p for d in documents for p in zip([START, *d], [*d, END], strict=True))
        assert shown == true
        assert batch.num_tokens == len(true)


@given(DOCUMENTS, st.integers(0, 5), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 6]))
def test_the_rows_of_a_step_are_the_same_for_any_world_and_micro_batch(documents, step: int, micro: int, world: int):
    alone = join_micro_batches(loader_of(documents, batch_size=6, micro_batch_size=6).batches(step))
    shares = [
        loader_of(documents, batch_size=6, micro_batch_size=micro, shard=DataShard(rank, world))
        for rank in range(world)
    ]
    assert are_equal(join_micro_batches([batch for feed in shares for batch in feed.batches(step)]), alone)
    assert all(len(b.input_ids) <= micro for feed in shares for b in feed.batches(step))


def test_a_step_can_be_asked_for_in_any_order():
    documents = [[i] * (i % 7) for i in range(3, 40)]
    straight = [join_micro_batches(loader_of(documents).batches(step)) for step in range(30)]
    one = loader_of(documents)
    assert all(are_equal(join_micro_batches(one.batches(step)), straight[step]) for step in (29, 3, 17, 3, 0, 28))


def test_positions_restart_and_segments_count_as_drawn():
    feed = rows_of([[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]], 5)
    feed._epoch = lambda seed, epoch: order([0, 1, 2], [0, 6, 9], [0, 1, 2])
    batch = feed.collate(range(3), 0)
    assert batch.input_ids.tolist() == [[1, 3, 4, 5, 6], [7, 1, 8, 9, 1], [10, 11, 12, 1, 1]]
    assert batch.targets.tolist() == [[3, 4, 5, 6, 7], [2, 8, 9, 2, 10], [11, 12, 2, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 0], [0, 1, 2, -1, -1]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2], [0, 0, 0, 0, 0]]
    assert batch.num_tokens == 13


def order(documents: list[int], begins: list[int], rows: list[int]) -> EpochOrder:
    return EpochOrder(np.array(documents), np.array(begins), np.array(rows))


def test_a_cut_document_gets_no_false_end():
    batch = rows_of([list(range(3, 40)), [40]], 8).collate(range(5), 0)
    ends = [
        (t, n)
        for t, n in zip(batch.input_ids.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
        if n == END
    ]
    assert sorted(ends) == [(39, END), (40, END)]


def test_a_single_document_gives_plain_rows():
    feed = rows_of([list(range(3, 20))], 8)
    batches = [feed.collate(range(r, r + 1), 0) for r in range(feed.rows_per_epoch)]
    assert all(b.position_ids is None and b.segment_ids is None for b in batches)
    assert sum(b.num_tokens for b in batches) == 18
    assert sum(int((b.targets >= 0).sum()) for b in batches) == 18


def test_epochs_and_seeds_have_their_own_order_of_documents_and_rows():
    documents = [[3 + i] * 3 for i in range(40)]
    feed = loader_of(documents, batch_size=32, sequence_length=5)  # 160 inputs are 32 rows
    epochs = [feed.batches(step)[0].input_ids.tolist() for step in range(2)]
    assert sorted(epochs[0]) != sorted(epochs[1])  # other neighbors, so other documents' order
    assert loader_of(documents, batch_size=32, sequence_length=5, seed=1).batches(0)[0].input_ids.tolist() != epochs[0]
    alone = loader_of([list(range(3, 43))], batch_size=10, micro_batch_size=10)
    assert (
        alone.batches(0)[0].input_ids.tolist() != alone.batches(1)[0].input_ids.tolist()
    )  # one document: other rows' order


def test_the_order_is_the_same_on_every_machine():
    assert shuffle_indices(10, 0, 0).tolist() == [7, 1, 8, 5, 4, 2, 9, 3, 0, 6]
    assert sorted(shuffle_indices(1000, 7).tolist()) == list(range(1000))


def test_the_order_is_even():
    places = np.stack([shuffle_indices(8, seed, 0) for seed in range(4000)])
    for place in range(8):
        counts = np.bincount(places[:, place], minlength=8)
        assert np.abs(counts - 500).max() < 110  # five standard deviations


def test_a_bookmark_of_other_data_is_refused():
    feed = loader_of([[3, 4], [5]])
    feed.load_state_dict(feed.state_dict())
    loader_of([[3, 4], [5]], micro_batch_size=1, shard=DataShard(1, 2)).load_state_dict(feed.state_dict())
    with pytest.raises(DataError, match="data was"):
        loader_of([[3, 4], [6]]).load_state_dict(feed.state_dict())
    with pytest.raises(DataError, match="seed was 0, is 1"):
        loader_of([[3, 4], [5]], seed=1).load_state_dict(feed.state_dict())


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="sequence_length is 0"):
        loader_of([[3]], sequence_length=0)
    with pytest.raises(UsageError, match="batch_size is 0, micro_batch_size is -1; expected at least 1"):
        loader_of([[3]], batch_size=0, micro_batch_size=-1)
    with pytest.raises(UsageError, match="4 rows cannot be shared by 3 processes"):
        loader_of([[3]], shard=DataShard(0, 3))
    with pytest.raises(DataError, match="holds no documents"):
        loader_of([])


def test_a_batch_moves_and_is_cut_whole():
    [batch] = loader_of([[3, 4], [5]]).batches(0)
    moved = batch.to("cpu")
    assert are_equal(join_micro_batches([moved]), join_micro_batches([batch]))
    assert moved.num_tokens == batch.num_tokens == int((batch.position_ids >= 0).sum())
    assert are_equal(join_micro_batches([batch.slice_rows(0, 1), batch.slice_rows(1, 4)]), join_micro_batches([batch]))
    assert sum(batch.slice_rows(i, i + 1).num_tokens for i in range(4)) == batch.num_tokens
