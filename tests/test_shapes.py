"""The checks of shapes that every other test runs under: they find a wrong one at the first call and at any later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from llm_quest.layers.norm import RMSNorm
from tests.shapes import check_shapes


@check_shapes
def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], spoil: str = "") -> Float[Tensor, "n m"]:
    return (a @ b).long() if spoil == "dtype" else (a @ b).T if spoil == "shape" else a @ b


@check_shapes
def last(*parts: Float[Tensor, "B T"]) -> Float[Tensor, " B"]:
    return parts[-1][:, -1]


@check_shapes
@dataclass
class Pair:
    left: Float[Tensor, " n"]
    right: Float[Tensor, " n"]


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


WRONG: dict[str, Callable[[], object]] = {
    "a dimension twice, two sizes": lambda: product(ones(2, 3), ones(4, 5)),
    "by name": lambda: product(a=ones(2, 3), b=ones(4, 5)),
    "one dimension too many": lambda: product(ones(1, 2, 3), ones(3, 5)),
    "a dtype": lambda: product(ones(2, 3).long(), ones(3, 5).long()),
    "no tensor": lambda: product(None, ones(3, 5)),
    "the result's shape": lambda: product(ones(2, 3), ones(3, 5), "shape"),
    "the result's dtype": lambda: product(ones(2, 3), ones(3, 5), "dtype"),
    "one of several": lambda: last(ones(2, 3), ones(2, 4)),
    "a dataclass": lambda: Pair(ones(2), ones(3)),
    "a layer": lambda: RMSNorm(4, 1e-5)(ones(2, 4).long()),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_shape_is_found_however_many_right_calls_came_before(wrong: str):
    for _ in range(3):
        with pytest.raises(TypeCheckError):
            WRONG[wrong]()
        assert product(ones(2, 3), ones(3, 5)).shape == (2, 5)
        assert product(a=ones(2, 3), b=ones(3, 5)).shape == (2, 5)
        assert last(ones(2, 3), ones(2, 3)).shape == (2,)
        assert Pair(ones(2), ones(2)).left.shape == (2,)
        assert RMSNorm(4, 1e-5)(ones(2, 4)).shape == (2, 4)


def test_what_has_no_shapes_is_left_as_it_is():
    def plain(a: int, b: Tensor) -> str:
        return f"{a}{b}"

    assert check_shapes(plain) is plain


def test_what_is_compiled_is_not_compiled_anew_after_calls_of_other_shapes():
    """The set of the shapes that have been seen grows with every test: traced, each of its entries would be guarded."""
    graphs = []
    compiled = torch.compile(product, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    for size in (7, 8, 9):
        assert compiled(ones(2, 3), ones(3, 5)).shape == (2, 5)
        product(ones(2, size), ones(size, 5))
    assert len(graphs) == 1
