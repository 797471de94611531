"""What passes cost, against PyTorch's counter at other lengths and against a sum by hand."""

from __future__ import annotations

import pytest

from llm_quest.models.build import build
from llm_quest.models.flops import FlopCost, count_forward_flops, measure_flop_cost


@pytest.mark.parametrize("name", ["llama3.2-tiny", "gpt2-tiny", "deepseek-v3-tiny"])
def test_two_lengths_say_what_every_other_costs(name: str):
    model = build(name)
    cost = measure_flop_cost(model)
    for length in (1, 7, 33):
        assert cost.forward(length) == pytest.approx(count_forward_flops(model, length), rel=1e-9)


def test_products_with_weights_are_two_operations_a_weight():
    model = build("llama3.2-tiny")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    assert measure_flop_cost(model).per_token == 2 * matrices, (
        "the tied embedding is a product once, where it is the head"
    )


def test_decoding_by_hand():
    cost = FlopCost(per_token=10.0, per_pair=1.0)
    assert cost.forward(3) == 30 + 9
    assert cost.training(3) == 3 * 39
    assert cost.decoding(5, 1) == 0, "the first token comes out of the prompt's pass"
    assert cost.decoding(5, 3) == (10 + 6) + (10 + 7)
