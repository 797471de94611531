"""Rows of conversations: a blackboard, every example once an epoch, and the same rows for any number of ranks."""

import numpy as np
import pytest
import torch

from llm_quest.contracts import Share
from llm_quest.data.chat import Example
from llm_quest.data.documents import Ledger
from llm_quest.data.instructions import InstructionFeed, Rows, fitting, packed
from llm_quest.errors import DataError


def example(*ids: int, answer: int, after: int = 0) -> Example:
    """The last `answer` ids are learned, but for `after` at the end."""
    where = np.arange(len(ids))
    return Example(np.array(ids), (where >= len(ids) - answer - after) & (where < len(ids) - after))


def many(number: int) -> list[Example]:
    return [example(*range(100 * n, 100 * n + 3 + n % 5), answer=2) for n in range(1, number + 1)]


def test_two_conversations_on_a_blackboard():
    batch = Rows([example(1, 2, 3, 4, answer=2), example(5, 6, 7, answer=1, after=1)], 6).batch([0])
    assert batch.tokens[0].tolist() == [1, 2, 3, 5, 0, 0]
    assert batch.targets[0].tolist() == [-100, 3, 4, 6, -100, -100]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, -1, -1]
    assert batch.segments[0].tolist() == [0, 0, 0, 1, 0, 0]
    assert batch.num_tokens == 4


def test_every_learned_id_is_a_target_once_an_epoch():
    examples = many(23)
    rows = Rows(examples, 16)
    feed = InstructionFeed(rows, rows=1, micro_rows=1, seed=3)
    for epoch in range(2):
        batches = [feed.at(epoch * len(rows) + n)[0] for n in range(len(rows))]
        seen = torch.cat([batch.targets[batch.targets != -100] for batch in batches]).sort().values
        assert seen.tolist() == sorted(int(i) for one in examples for i in one.ids[one.learned])
    assert rows.num_targets == 46


def test_rows_are_a_function_of_seed_and_step_for_any_split():
    rows = Rows(many(40), 16)
    whole = InstructionFeed(rows, rows=4, micro_rows=4, seed=1).at(5)[0]
    parts = [
        batch.tokens
        for rank in range(2)
        for batch in InstructionFeed(rows, rows=4, micro_rows=1, seed=1, share=Share(rank, 2)).at(5)
    ]
    assert torch.equal(torch.cat(parts), whole.tokens)
    assert not torch.equal(InstructionFeed(rows, rows=4, micro_rows=4, seed=2).at(5)[0].tokens, whole.tokens)


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing_and_overfills_nothing(seed):
    sizes = np.random.default_rng(seed).integers(1, 33, 200).tolist()
    rows = packed(sizes, 32)
    assert sorted(n for row in rows for n in row) == list(range(200))
    assert all(sum(sizes[n] for n in row) <= 32 for row in rows)
    assert len(rows) <= 1.1 * sum(sizes) / 32 + 1


def test_a_conversation_longer_than_a_row_is_dropped_and_counted_and_all_of_them_an_error():
    ledger = Ledger()
    assert len(fitting(many(5), 4, ledger)) == 3  # 4, 5, 6 and 7 ids; the last is no input
    assert ledger.dropped == {"longer than a row of 4 tokens": [2, 0]}
    with pytest.raises(
        DataError, match=r"no conversation fits into 1 tokens \(the shortest has 2\); raise batch.length"
    ):
        fitting(many(5), 1, Ledger())


def test_another_data_set_cannot_go_on_from_a_bookmark():
    feed = InstructionFeed(Rows(many(9), 16), rows=2, micro_rows=2, seed=0)
    feed.resume(feed.bookmark())
    with pytest.raises(DataError, match="another stream of data: data was"):
        InstructionFeed(Rows(many(8), 16), rows=2, micro_rows=2, seed=0).resume(feed.bookmark())
