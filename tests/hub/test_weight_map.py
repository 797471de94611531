"""One table, both ways."""

from __future__ import annotations

import pytest
import torch

import llm_quest as quest
from llm_quest.errors import UsageError
from llm_quest.hub.weight_map import compact_names, entry_views, weight_views
from llm_quest.layers.linear import PackedLinear
from llm_quest.models import FAMILIES
from llm_quest.models.weight_names import ConcatRows, Transposed

TINY = [preset.name for page in FAMILIES for preset in page.presets if preset.name.endswith("-tiny")]


def test_stacked_rows_are_cut_in_the_order_of_the_table():
    parameter = torch.arange(8).view(4, 2)
    q, k = (view(parameter) for _, view in entry_views(ConcatRows("q", "k"), (3, 1)))
    assert q.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert k.tolist() == [[6, 7]]


def test_a_transposed_entry_is_our_parameter_turned():
    ((name, view),) = entry_views(Transposed("c_attn"), ())
    assert name == "c_attn"
    assert view(torch.arange(6).view(2, 3)).tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("name", TINY)
def test_the_places_of_a_model_cover_every_number_of_it_exactly_once(name):
    model = quest.build(name)
    parameters = {path: torch.zeros_like(p) for path, p in model.named_parameters()}
    page = next(page for page in FAMILIES if type(model.config) is page.Config)
    for place in weight_views(model, page.weight_map(model.config)).values():
        place.view(parameters[place.parameter]).add_(1)
    assert all(bool((count == 1).all()) for count in parameters.values())


def test_a_parameter_without_a_published_name_is_refused_by_name():
    model = torch.nn.ModuleDict({"qkv": PackedLinear(4, q=2, k=2), "adapter": torch.nn.Linear(2, 2, bias=False)})
    with pytest.raises(UsageError, match=r"adapter\.weight.*merge or remove"):
        weight_views(model, {"qkv.weight": ConcatRows("q", "k")})


def test_names_of_many_layers_are_drawn_together_completely():
    names = [f"h.{i}.ln.bias" for i in (0, 1, 2, 5)] + ["wte.weight", "h.7.mlp.weight"]
    assert compact_names(names) == "h.{0-2,5}.ln.bias, h.7.mlp.weight, wte.weight"
