from __future__ import annotations

import pytest
import torch

from llm_quest.layers.linear import PackedLinear


@pytest.mark.parametrize("bias", [False, True])
def test_the_parts_are_products_with_their_own_rows(bias: bool, generator: torch.Generator):
    layer = PackedLinear(3, q=4, k=2, v=2, bias=bias)
    x = torch.randn(2, 5, 3, generator=generator)
    parts = layer(x)
    assert [part.shape[-1] for part in parts] == [4, 2, 2]
    for name, part in zip(("q", "k", "v"), parts, strict=True):
        rows = layer.row_slice(name)
        expected = x @ layer.weight[rows].T + (layer.bias[rows] if bias else 0)
        torch.testing.assert_close(part, expected)


def test_rows_are_stacked_in_the_order_given():
    layer = PackedLinear(3, q=4, k=2, v=1)
    assert [layer.row_slice(name) for name in "qkv"] == [slice(0, 4), slice(4, 6), slice(6, 7)]


def test_an_unknown_part_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match="no part 'gate' here: it has q, k"):
        PackedLinear(3, q=4, k=2).row_slice("gate")
