"""Who may look at whom, written as rows of zeros and ones."""

from __future__ import annotations

import pytest
import torch

from llm_quest.layers.kv_cache import Cache
from llm_quest.scope import CausalMask, Scope, SlidingWindow

TOKENS = torch.zeros(1, 4, dtype=torch.int64)


def rows(mask: torch.Tensor) -> list[str]:
    """The first row of a batch of masks, as one would write it on a blackboard."""
    return ["".join("01"[int(seen)] for seen in query) for query in mask[0]]


def test_a_query_sees_itself_and_what_came_before():
    assert rows(Scope(torch.arange(4)[None]).attention_mask()) == ["1000", "1100", "1110", "1111"]


def test_a_window_of_two_is_the_token_itself_and_one_before():
    assert rows(Scope(torch.arange(4)[None]).attention_mask(2)) == ["1000", "1100", "0110", "0011"]
    assert Scope.unpadded(TOKENS).attention_mask(2) == SlidingWindow(2), "known without looking"
    assert Scope.unpadded(TOKENS).attention_mask(4) is CausalMask.CAUSAL


def test_padding_sees_padding_only_and_nobody_else_sees_it():
    left = Scope(torch.tensor([[-1, -1, 0, 1]]))
    assert rows(left.attention_mask()) == ["1100", "1100", "0010", "0011"]
    middle = Scope(torch.tensor([[0, -1, 1, 2]]))
    assert rows(middle.attention_mask()) == ["1000", "0100", "1010", "1011"]
    assert rows(middle.attention_mask(2)) == ["1000", "0100", "1010", "0011"]


def test_packed_documents_do_not_see_each_other():
    packed = Scope(torch.tensor([[0, 1, 0, 1]]), segment_ids=torch.tensor([[0, 0, 1, 1]]))
    assert rows(packed.attention_mask()) == ["1000", "1100", "0010", "0011"]


def test_padding_belongs_to_no_document_whatever_its_segment_says():
    packed = Scope(torch.tensor([[0, 1, -1, -1]]), segment_ids=torch.tensor([[0, 0, 0, 5]]))
    assert rows(packed.attention_mask()) == ["1000", "1100", "0011", "0011"]


def test_looking_ahead_sees_everything_that_exists():
    assert rows(Scope(torch.tensor([[0, 1, 2, -1]]), bidirectional=True).attention_mask()) == [
        "1110",
        "1110",
        "1110",
        "0001",
    ]


def test_slots_of_a_ring_are_seen_by_position_not_by_place():
    scope = Scope(torch.tensor([[5, 6]]))
    assert rows(scope.build_mask(torch.tensor([[-1, 4, 5, 6, 3]]), None, None)) == ["01101", "01111"]
    assert rows(scope.build_mask(torch.tensor([[-1, 4, 5, 6, 3]]), None, 3)) == ["01101", "01110"]


def test_what_is_known_by_construction_is_not_worked_out():
    assert Scope.unpadded(TOKENS).attention_mask() is CausalMask.CAUSAL
    assert Scope.unpadded(TOKENS).attention_mask(4) is CausalMask.CAUSAL
    assert Scope.unpadded(TOKENS, bidirectional=True).attention_mask() is CausalMask.FULL
    assert Scope.unpadded(TOKENS[:, :1]).attention_mask() is CausalMask.FULL


def test_plain_positions_count_from_the_start():
    scope = Scope.unpadded(torch.zeros(2, 3, dtype=torch.int64), start=5)
    assert scope.position_ids.tolist() == [[5, 6, 7], [5, 6, 7]]
    assert scope.max_seq_len == 8


def test_the_mask_is_worked_out_once_per_window():
    scope = Scope(torch.tensor([[-1, 0, 1]]))
    assert scope.attention_mask() is scope.for_layer(3).attention_mask()
    assert scope.attention_mask(2) is scope.for_layer(1).attention_mask(2)
    assert scope.attention_mask(2) is not scope.attention_mask()


def test_a_layer_sees_its_own_part_of_the_cache():
    parts = [object(), object()]
    scope = Scope.unpadded(TOKENS, cache=Cache(parts, batch_size=1, capacity=8))
    assert scope.layer_cache is None
    assert [scope.for_layer(layer).layer_cache for layer in (0, 1)] == parts
    assert Scope.unpadded(TOKENS).for_layer(0).layer_cache is None


def test_records_are_kept_only_for_whoever_asked():
    Scope.unpadded(TOKENS).record("loss", torch.tensor(1.0))
    asked: dict[str, list[torch.Tensor]] = {}
    scope = Scope.unpadded(TOKENS, records=asked)
    for layer in range(2):
        scope.for_layer(layer).record("loss", torch.tensor(float(layer)))
    assert [value.item() for value in asked["loss"]] == [0.0, 1.0]


def test_segments_with_a_cache_are_refused():
    with pytest.raises(ValueError, match="one document per row"):
        Scope(torch.arange(4)[None], segment_ids=TOKENS, cache=Cache([], batch_size=1, capacity=8))
