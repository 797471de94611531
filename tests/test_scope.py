"""Who may look at whom, written as rows of zeros and ones."""

from __future__ import annotations

import pytest
import torch

from llm_quest.layers.cache import Cache
from llm_quest.scope import Band, Plain, Scope

TOKENS = torch.zeros(1, 4, dtype=torch.int64)


def rows(mask: torch.Tensor) -> list[str]:
    """The first row of a batch of masks, as one would write it on a blackboard."""
    return ["".join("01"[int(seen)] for seen in query) for query in mask[0]]


def test_a_query_sees_itself_and_what_came_before():
    assert rows(Scope(torch.arange(4)[None]).visible()) == ["1000", "1100", "1110", "1111"]


def test_a_window_of_two_is_the_token_itself_and_one_before():
    assert rows(Scope(torch.arange(4)[None]).visible(2)) == ["1000", "1100", "0110", "0011"]
    assert Scope.plain(TOKENS).visible(2) == Band(2), "known without looking"
    assert Scope.plain(TOKENS).visible(4) is Plain.CAUSAL


def test_padding_sees_padding_only_and_nobody_else_sees_it():
    left = Scope(torch.tensor([[-1, -1, 0, 1]]))
    assert rows(left.visible()) == ["1100", "1100", "0010", "0011"]
    middle = Scope(torch.tensor([[0, -1, 1, 2]]))
    assert rows(middle.visible()) == ["1000", "0100", "1010", "1011"]
    assert rows(middle.visible(2)) == ["1000", "0100", "1010", "0011"]


def test_packed_documents_do_not_see_each_other():
    packed = Scope(torch.tensor([[0, 1, 0, 1]]), segments=torch.tensor([[0, 0, 1, 1]]))
    assert rows(packed.visible()) == ["1000", "1100", "0010", "0011"]


def test_padding_belongs_to_no_document_whatever_its_segment_says():
    packed = Scope(torch.tensor([[0, 1, -1, -1]]), segments=torch.tensor([[0, 0, 0, 5]]))
    assert rows(packed.visible()) == ["1000", "1100", "0011", "0011"]


def test_looking_ahead_sees_everything_that_exists():
    assert rows(Scope(torch.tensor([[0, 1, 2, -1]]), ahead=True).visible()) == ["1110", "1110", "1110", "0001"]


def test_slots_of_a_ring_are_seen_by_position_not_by_place():
    scope = Scope(torch.tensor([[5, 6]]))
    assert rows(scope.sees(torch.tensor([[-1, 4, 5, 6, 3]]), None, None)) == ["01101", "01111"]
    assert rows(scope.sees(torch.tensor([[-1, 4, 5, 6, 3]]), None, 3)) == ["01101", "01110"]


def test_what_is_known_by_construction_is_not_worked_out():
    assert Scope.plain(TOKENS).visible() is Plain.CAUSAL
    assert Scope.plain(TOKENS).visible(4) is Plain.CAUSAL
    assert Scope.plain(TOKENS, ahead=True).visible() is Plain.ALL
    assert Scope.plain(TOKENS[:, :1]).visible() is Plain.ALL


def test_plain_positions_count_from_the_start():
    scope = Scope.plain(torch.zeros(2, 3, dtype=torch.int64), start=5)
    assert scope.positions.tolist() == [[5, 6, 7], [5, 6, 7]]
    assert scope.reach == 8


def test_the_mask_is_worked_out_once_per_window():
    scope = Scope(torch.tensor([[-1, 0, 1]]))
    assert scope.visible() is scope.at(3).visible()
    assert scope.visible(2) is scope.at(1).visible(2)
    assert scope.visible(2) is not scope.visible()


def test_a_layer_sees_its_own_part_of_the_cache():
    parts = [object(), object()]
    scope = Scope.plain(TOKENS, cache=Cache(parts, batch=1, capacity=8))
    assert scope.memory is None
    assert [scope.at(layer).memory for layer in (0, 1)] == parts
    assert Scope.plain(TOKENS).at(0).memory is None


def test_records_are_kept_only_for_whoever_asked():
    Scope.plain(TOKENS).record("loss", torch.tensor(1.0))
    asked: dict[str, list[torch.Tensor]] = {}
    scope = Scope.plain(TOKENS, records=asked)
    for layer in range(2):
        scope.at(layer).record("loss", torch.tensor(float(layer)))
    assert [value.item() for value in asked["loss"]] == [0.0, 1.0]


def test_segments_with_a_cache_are_refused():
    with pytest.raises(ValueError, match="one document per row"):
        Scope(torch.arange(4)[None], segments=TOKENS, cache=Cache([], batch=1, capacity=8))
