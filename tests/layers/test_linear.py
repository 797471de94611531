"""Few rows the other way round: the same numbers, shapes and dtypes as F.linear, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llm_quest.layers import native
from llm_quest.layers.linear import (
    FEW_ROWS,
    KERNEL_ROWS,
    Linear,
    linear_by_kernel,
    linear_few_rows,
    set_few_row_products,
)

needs_compiler = pytest.mark.skipif(not native.is_loaded(), reason=f"no C++ kernel: {native.Library.reason}")


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


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_in_cpp_is_the_product_and_a_row_does_not_depend_on_the_others(dtype: torch.dtype):
    """On every instruction set, for widths that fill no register, and where a number is not finite."""
    for out, width in ((5, 32), (3, 40), (9, 768), (1, 7), (4, 1), (6, 33), (70, 1024), (37, 96)):
        weight, x = draw(out, width, dtype=dtype), draw(9, width)
        exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        for isa in ("plain", "avx2", "avx512"):
            made = torch.ops.llm_quest.float_rows(x, weight, native.ISA[isa])
            assert ((made - exact).abs() <= 2e-6 * size).all(), (out, width, isa)
            for rows in (0, 1, 2, 3, 5):
                alone = torch.ops.llm_quest.float_rows(x[:rows], weight, native.ISA[isa])
                assert torch.equal(alone, made[:rows])
    x[1, 3] = float("nan")
    made = torch.ops.llm_quest.float_rows(x, weight, 0)
    assert made[0].isfinite().all()
    assert made[1].isnan().all()


@pytest.fixture
def rows_by_kernel(monkeypatch) -> list[int]:
    """The numbers of rows that the loop in C++ was asked for."""
    asked: list[int] = []
    monkeypatch.setattr(
        "llm_quest.layers.linear.linear_by_kernel", lambda x, *rest: asked.append(len(x)) or linear_by_kernel(x, *rest)
    )
    return asked


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_takes_the_loop_in_cpp_for_its_rows_alone(dtype: torch.dtype, rows_by_kernel: list[int]):
    """Not with a gradient, on the meta device, nor for more rows."""
    assert set_few_row_products({}, {str(dtype).removeprefix("torch."): (1, 3)}) == ""
    layer, x = Linear(6, 4, dtype=dtype), draw(2, 1, 6, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert Linear(6, 4, device="meta", dtype=dtype)(x.to("meta")).device.type == "meta"
        layer(draw(3, 1, 6, dtype=dtype))
    layer(x)
    assert rows_by_kernel == [2]


@needs_compiler
def test_the_loop_in_cpp_compiles_and_is_not_in_an_exported_program():
    set_few_row_products({}, {"float32": (1, 3)})
    layer, x = Linear(6, 4), draw(2, 1, 6)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), layer(x))
    assert "float_rows" not in str(exported.graph)
    torch.library.opcheck(
        torch.ops.llm_quest.float_rows, (x.reshape(2, 6), layer.weight.detach(), 0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_without_the_library_the_plain_order_is_taken_and_the_reason_is_told(monkeypatch):
    monkeypatch.setenv("LLM_QUEST_NATIVE", "0")
    monkeypatch.setattr(native.Library, "loaded", None)
    monkeypatch.setattr(native.Library, "reason", "")
    assert set_few_row_products({"float32": (2, 3)}, {"float32": (1, 2)}) == "LLM_QUEST_NATIVE=0"
    assert not KERNEL_ROWS
    assert {torch.float32: range(2, 3)} == FEW_ROWS
    assert not set_few_row_products({}, {}), "who does not ask for it hears nothing"
