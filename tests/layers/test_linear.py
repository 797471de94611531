"""Few rows the other way round: the same numbers, shapes and dtypes as F.linear, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llm_quest.layers.linear import FEW_ROWS, Linear, linear_few_rows


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("biased", [True, False])
def test_few_rows_are_what_linear_gives(rows, dtype, biased):
    x, weight, bias = (
        draw(rows, 1, 24, dtype=dtype),
        draw(40, 24, dtype=dtype),
        draw(40, dtype=dtype) if biased else None,
    )
    found, expected = linear_few_rows(x, weight, bias), F.linear(x, weight, bias)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    atol = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 0.13}[dtype]  # one rounding of numbers up to 16
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_any_leading_shape_comes_back():
    weight, bias = draw(5, 3), draw(5)
    for x in (draw(3), draw(2, 3), draw(2, 4, 3), draw(4, 2, 3).transpose(0, 1)):
        torch.testing.assert_close(linear_few_rows(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", FEW_ROWS)
def test_the_layer_takes_the_quick_order_for_few_rows_without_gradients_and_no_other(dtype, monkeypatch):
    layer, asked = Linear(6, 4, dtype=dtype), []
    monkeypatch.setattr(
        "llm_quest.layers.linear.linear_few_rows", lambda x, *rest: asked.append(len(x)) or linear_few_rows(x, *rest)
    )
    counts = (1, 7, 8, 64, 65)
    with torch.no_grad():
        for rows in counts:
            x = draw(rows, 6, dtype=dtype)
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=0.02, rtol=0)
    assert asked == [rows for rows in counts if rows in FEW_ROWS[dtype]]
    layer(draw(8, 6, dtype=dtype)).sum().backward()
    layer.weight.data = layer.weight.data.T.contiguous().T
    with torch.no_grad():
        layer(draw(8, 6, dtype=dtype))
    assert len(asked) == sum(rows in FEW_ROWS[dtype] for rows in counts), "not with a gradient, nor for a turned matrix"


def test_autocast_finds_the_same_dtype():
    layer = Linear(6, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(draw(8, 6)).dtype == F.linear(draw(8, 6), layer.weight, layer.bias).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [8, 64])
def test_under_autocast_what_is_passed_on_lies_in_rows(rows: int):
    """The quick order gives columns; a layer of another dtype than its input copies its weights once a row for them
    (a decode step of 64 rows: 13 times slower)."""
    layer = Linear(6, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(draw(rows, 1, 6)).stride() == (4, 4, 1)
