"""Held-out batches: every token once, documents alone, bits per byte exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.data.packing import HeldOutLoader, eval_batches
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.errors import DataError, UsageError

DOCUMENTS = st.lists(st.lists(st.integers(3, 50), max_size=20), min_size=1, max_size=8)


def tokens_of(documents: list[list[int]]) -> TokenizedDocuments:
    return TokenizedDocuments.from_token_lists(documents, vocab_size=51, start=1, end=2)


@given(DOCUMENTS, st.integers(1, 9), st.integers(1, 4))
def test_every_document_is_covered_once_in_order_and_alone(documents: list[list[int]], length: int, micro_rows: int):
    held = eval_batches(tokens_of(documents), length, micro_rows)
    found: list[list[tuple[int, int]]] = [[] for _ in documents]
    for number, batch in enumerate(held):
        assert batch.input_ids.shape == (micro_rows, length)
        owners = held.document_ids(number)
        assert torch.equal(owners >= 0, batch.targets >= 0)
        assert torch.equal(owners >= 0, batch.position_ids >= 0)
        for b in range(micro_rows):
            for segment in range(int(batch.segment_ids[b].max()) + 1):
                here = (batch.segment_ids[b] == segment) & (owners[b] >= 0)
                assert len(set(owners[b][here].tolist())) <= 1
                assert batch.position_ids[b][here].tolist() == list(range(int(here.sum())))
        for owner, token, target in zip(
            owners.flatten(), batch.input_ids.flatten(), batch.targets.flatten(), strict=True
        ):
            if owner >= 0:
                found[int(owner)].append((int(token), int(target)))
    true = [list(zip([1, *d], [*d, 2], strict=True)) for d in documents]
    assert [sorted(pairs) for pairs in found] == [sorted(pairs) for pairs in true]
    assert held.num_targets == sum(map(len, true))
    assert held.num_bytes == sum(map(len, documents))


def test_short_documents_share_rows():
    held = eval_batches(tokens_of([[3] * n for n in (5, 1, 3, 2, 6)]), 8, 2)  # 6 + 2, 4 + 3, 7
    assert sorted(sum(b - a for a, b, _ in row) for row in held._rows) == [7, 7, 8]


def test_a_limit_takes_whole_documents_and_counts_their_bytes():
    tokens = tokens_of([[3] * 9 for _ in range(20)])
    held = eval_batches(tokens, 4, 2, max_targets=35)
    assert (len(held.documents), held.num_targets, held.num_bytes) == (3, 30, 27)
    assert np.array_equal(held.documents, eval_batches(tokens, 4, 2, max_targets=35).documents)
    assert len(eval_batches(tokens, 4, 2, max_targets=1).documents) == 1


def test_bits_per_byte_of_a_uniform_guess():
    held = HeldOutLoader(
        tokens_of([[3, 4, 5], [6]]), sequence_length=8, batch_size=1
    )  # 4 bytes, 6 targets, 51 tokens to guess from
    assert held.bits_per_byte(6 * math.log(51)) == pytest.approx(6 / 4 * math.log2(51))


def test_mistakes_are_named():
    with pytest.raises(DataError, match="nothing was held out"):
        eval_batches(tokens_of([]), 8, 1)
    with pytest.raises(UsageError, match="length 0"):
        eval_batches(tokens_of([[3]]), 0, 1)
