"""Rows of conversations: a blackboard, every example once an epoch, and the same rows for any number of ranks."""

import numpy as np
import pytest
import torch

from llm_quest.contracts import DataShard
from llm_quest.data.chat import ChatExample
from llm_quest.data.document import DropReport
from llm_quest.data.instructions import PackedExamples, drop_too_long
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.packing import pack_best_fit
from llm_quest.errors import DataError


def example(*ids: int, answer: int, after: int = 0) -> ChatExample:
    """The last `answer` ids are learned, but for `after` at the end."""
    where = np.arange(len(ids))
    return ChatExample(np.array(ids), (where >= len(ids) - answer - after) & (where < len(ids) - after))


def chat_examples(number: int) -> list[ChatExample]:
    return [example(*range(100 * n, 100 * n + 3 + n % 5), answer=2) for n in range(1, number + 1)]


def test_two_conversations_on_a_blackboard():
    batch = PackedExamples([example(1, 2, 3, 4, answer=2), example(5, 6, 7, answer=1, after=1)], 6).collate([0])
    assert batch.input_ids[0].tolist() == [1, 2, 3, 5, 0, 0]
    assert batch.targets[0].tolist() == [-100, 3, 4, 6, -100, -100]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, -1, -1]
    assert batch.segment_ids[0].tolist() == [0, 0, 0, 1, 0, 0]
    assert batch.num_tokens == 4


def test_every_learned_id_is_a_target_once_an_epoch():
    examples = chat_examples(23)
    rows = PackedExamples(examples, 16)
    feed = ShardedLoader(rows, batch_size=1, micro_batch_size=1, seed=3)
    for epoch in range(2):
        batches = [feed.batches(epoch * len(rows) + n)[0] for n in range(len(rows))]
        seen = torch.cat([batch.targets[batch.targets != -100] for batch in batches]).sort().values
        assert seen.tolist() == sorted(int(i) for one in examples for i in one.input_ids[one.assistant_mask])
    assert rows.num_targets == 46


def test_rows_are_a_function_of_seed_and_step_for_any_split():
    rows = PackedExamples(chat_examples(40), 16)
    whole = ShardedLoader(rows, batch_size=4, micro_batch_size=4, seed=1).batches(5)[0]
    parts = [
        batch.input_ids
        for rank in range(2)
        for batch in ShardedLoader(rows, batch_size=4, micro_batch_size=1, seed=1, shard=DataShard(rank, 2)).batches(5)
    ]
    assert torch.equal(torch.cat(parts), whole.input_ids)
    assert not torch.equal(
        ShardedLoader(rows, batch_size=4, micro_batch_size=4, seed=2).batches(5)[0].input_ids, whole.input_ids
    )


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing_and_overfills_nothing(seed):
    sizes = np.random.default_rng(seed).integers(1, 33, 200).tolist()
    rows = pack_best_fit(sizes, 32)
    assert sorted(n for row in rows for n in row) == list(range(200))
    assert all(sum(sizes[n] for n in row) <= 32 for row in rows)
    assert len(rows) <= 1.1 * sum(sizes) / 32 + 1


def test_a_conversation_longer_than_a_row_is_dropped_and_counted_and_all_of_them_an_error():
    ledger = DropReport()
    assert len(drop_too_long(chat_examples(5), 4, ledger)) == 3  # 4, 5, 6 and 7 ids; the last is no input
    assert ledger.dropped == {"longer than a row of 4 tokens": [2, 0]}
    with pytest.raises(
        DataError, match=r"no conversation fits into 1 tokens \(the shortest has 2\); raise sequence_length"
    ):
        drop_too_long(chat_examples(5), 1, DropReport())


def test_another_data_set_cannot_go_on_from_a_bookmark():
    feed = ShardedLoader(PackedExamples(chat_examples(9), 16), batch_size=2, micro_batch_size=2, seed=0)
    feed.load_state_dict(feed.state_dict())
    with pytest.raises(DataError, match="another stream of data: data was"):
        ShardedLoader(PackedExamples(chat_examples(8), 16), batch_size=2, micro_batch_size=2, seed=0).load_state_dict(
            feed.state_dict()
        )
