"""Parametrizations: every parameter has a role, first values and steps are as the table says, and activations change
alike at every width and depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load, save
from llm_quest.models import parametrization
from llm_quest.models.build import build, build_meta_model, preset
from llm_quest.models.parametrization import ROLES, parameter_roles, scale_first_values_, scale_parameters
from llm_quest.models.resize import differing_sizes, replace_sizes, resize_config
from llm_quest.train.optimizers import make_adamw, make_muon
from tests.train.coordinates import MOST_SLOPE, MOST_SPREAD, Case, changes, slope, spread, tiny_configs
from tests.train.rate_transfer import search_rates

TINY = tiny_configs()
NARROW_HEADS = replace(
    TINY["llama3.2-tiny"], num_attention_heads=6, num_key_value_heads=3, head_dim=8,
    rotary=replace(TINY["llama3.2-tiny"].rotary, dim=8),
)  # fmt: skip
"""Many small heads: what is random in one head's scores is averaged over more of them."""
LLAMA = replace(TINY["llama3.2-tiny"], tie_word_embeddings=False)


RAW_STREAM = ("olmo2-tiny", "olmo3-tiny", "exaone4-tiny")
"""Norms behind the branches alone."""


def scale_model(
    config: Any, wide: int, deep: int, kind: str = "completep", seed: int = 0
) -> tuple[Any, dict[str, Any]]:
    """A model of `wide` times the heads and `deep` times the layers, and its scales."""
    sizes = {"heads": wide * config.num_attention_heads, "layers": deep * config.num_hidden_layers}
    model = build(resize_config(config, **sizes), seed=seed)
    scales = scale_parameters(model, build_meta_model(config), kind)
    scale_first_values_(model, scales)
    return model, scales


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_of_every_family_has_a_role_and_a_scale(name: str):
    config = TINY[name]
    big = build_meta_model(
        resize_config(config, heads=2 * config.num_attention_heads, layers=2 * config.num_hidden_layers)
    )
    roles = parameter_roles(big)
    assert set(roles) == {one for one, _ in big.named_parameters()}
    assert set(roles.values()) <= set(ROLES)
    assert {"embedding", "hidden", "vector", "final_norm"} <= set(roles.values())
    assert ("branch_output" in roles.values()) != ("post_norm" in " ".join(roles)), "one of them sets a branch's size"
    scales = scale_parameters(big, build_meta_model(config), "completep")
    for found, role in roles.items():
        expected = {"hidden": 0.5, "branch_output": 0.25, "readout": 0.5, "head": 0.5, "vector": 1.0}.get(role)
        assert expected is None or scales[found].lr == pytest.approx(expected), found
    same = scale_parameters(build_meta_model(config), build_meta_model(config), "completep")
    of_raw = {"embed.token.weight": 50, "norm.weight": 1 / 50 if config.tie_word_embeddings else 1}
    for found, scale in same.items():
        grown = of_raw.get(found, 1) if name in RAW_STREAM else 1
        assert (scale.init, scale.lr) == pytest.approx((grown, grown)), found
        assert (scale.weight_decay, scale.eps) == pytest.approx((1 / grown, 1 / grown)), found
        assert scale.muon == pytest.approx([grown] * len(scale.muon)), found


@pytest.mark.parametrize("kind", ["standard", "mup", "completep"])
def test_at_the_base_nothing_changes(kind: str):
    model, scales = scale_model(LLAMA, 1, 1, kind)
    plain = build(LLAMA)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
    for make in (make_adamw, make_muon):
        after = [steps(copy, make, 2, kind and given) for copy, given in ((build(LLAMA), scales), (build(LLAMA), {}))]
        assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def steps(model: Any, make: Any, count: int, scales: Any) -> list[torch.Tensor]:
    """The parameters after so many steps."""
    extra = {"row_splits": model.row_splits(), "form": "float32"} if make is make_muon else {}
    optimizer = make(model, lr=1e-3, scales=scales, **extra)
    tokens = torch.arange(24).view(2, 12)
    for _ in range(count):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [one.detach().clone() for one in model.parameters()]


def test_first_values_follow_the_table():
    base, (model, _) = build(LLAMA), scale_model(LLAMA, 4, 4)
    std = lambda one, name: float(one.get_parameter(name).detach().std())  # noqa: E731
    for name, factor in {
        "embed.token.weight": 1.0, "head.weight": 1 / 4, "blocks.1.mixer.layer.qkv.weight": 1 / 2,
        "blocks.1.mixer.layer.out.weight": 1 / 8, "blocks.1.feed_forward.layer.down.weight": 1 / 8,
    }.items():  # fmt: skip
        assert std(model, name) / std(base, name) == pytest.approx(factor, rel=0.04), name


def test_a_folded_forward_factor_is_the_same_training():
    """A branch multiplied by 1/l with the base's rate, and its output matrix divided by l with a rate of 1/l."""
    rate, factor, x, target = 0.1, 0.25, torch.randn(6, 5), torch.randn(6, 3)
    outside, inside = torch.randn(3, 5).requires_grad_(), torch.zeros(3, 5)
    inside = (outside.detach() * factor).requires_grad_()
    first = torch.optim.AdamW([outside], lr=rate, eps=1e-2, weight_decay=0.3)
    second = torch.optim.AdamW([inside], lr=rate * factor, eps=1e-2 / factor, weight_decay=0.3 / factor)
    for _ in range(5):
        for optimizer, weight, times in ((first, outside, factor), (second, inside, 1.0)):
            optimizer.zero_grad()
            (times * F.linear(x, weight) - target).pow(2).mean().backward()
            optimizer.step()
    torch.testing.assert_close(inside, outside * factor)


@pytest.mark.parametrize(
    ("optim", "axis"), [("adamw", "width"), ("adamw", "depth"), ("muon", "width"), ("muon", "depth")]
)
def test_activations_change_alike_at_every_size(optim: str, axis: str):
    factors = (1, 4) if (optim, axis) == ("muon", "width") else (1, 8)
    case = Case(NARROW_HEADS, "completep", axis, factors, optim, seeds=1, steps=6)
    assert not list(changes_that_depend_on_size(case)), changes(case)
    assert list(changes_that_depend_on_size(replace(case, kind="standard"))), (
        "the standard parametrization fails beside it"
    )


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_norms_behind_the_branches_alone_need_an_embedding_of_size_one(optim: str, monkeypatch: pytest.MonkeyPatch):
    """A branch of size 1/l beside an embedding of 0.02: the deeper, the worse. With one of 1 the loss falls with depth
    and no activation changes more in larger models. (Streams change less in deep ones, towards a limit: branches of
    random weights add up to 1/sqrt(l).)"""
    deep = Case(TINY["olmo2-tiny"], "completep", "depth", (1, 8), optim, seeds=1, steps=6)
    wide = replace(deep, axis="width", factors=(1, 4))
    found = {case.axis: changes(case) for case in (wide, deep)}
    for case in (wide, deep):
        for name, values in found[case.axis].items():
            assert spread(values) <= MOST_SPREAD, (case.axis, name)
            assert slope(values, case.factors) <= MOST_SLOPE, (case.axis, name)
        assert found[case.axis]["loss"][-1] < found[case.axis]["loss"][0]
    monkeypatch.setattr(parametrization, "INITIAL_STD", 1.0)
    first, last = changes(deep)["loss"]
    assert last > found["depth"]["loss"][-1] + 0.3
    assert last > first, "beside an embedding of 0.02 deeper models learn more slowly"


def changes_that_depend_on_size(case: Case) -> Iterator[str]:
    """The activations whose change depends on the size."""
    for name, values in changes(case).items():
        if spread(values) > MOST_SPREAD or abs(slope(values, case.factors)) > MOST_SLOPE:
            yield name


def test_a_saved_folder_computes_the_same(tmp_path: Path):
    model, _ = scale_model(TINY["gemma2-tiny"], 2, 2)
    save(model, tmp_path / "folder")
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(load(tmp_path / "folder")(tokens), model(tokens))


def test_what_no_rule_covers_is_refused():
    wider_heads = build_meta_model(replace_sizes(LLAMA, {"hidden_size": 24, "num_attention_heads": 4, "head_dim": 8}))
    with pytest.raises(UsageError, match="keep head_dim"):
        scale_parameters(build_meta_model(LLAMA), wider_heads, "mup")
    with pytest.raises(UsageError, match="no size 'width'"):
        replace_sizes(LLAMA, {"width": 3})
    with pytest.raises(UsageError, match="expected a number above 0"):
        replace_sizes(LLAMA, {"hidden_size": "wide"})
    dense, sparse = TINY["qwen3-tiny"], TINY["qwen3-moe-tiny"]
    with pytest.raises(UsageError, match="nothing like blocks"):
        scale_parameters(build_meta_model(sparse), build_meta_model(dense), "mup")


def test_a_model_is_resized_by_its_heads():
    config = preset("qwen3-next-tiny").config
    small = resize_config(config, heads=2, layers=8)
    assert (small.hidden_size, small.num_key_value_heads, small.delta_net.linear_num_value_heads) == (24, 1, 2)
    assert small.layer_types == config.layer_types * 2
    assert replace_sizes(small, differing_sizes(small, config)) == config
    build(small)(torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize(("true", "center", "cap"), [(-7.3, -6, False), (-11.0, -5, False), (1.5, -4, True)])
def test_the_best_rate_is_found_wherever_the_search_begins(true: float, center: int, cap: bool):
    """A parabola in the octaves, to which the second seed adds as much everywhere and moves its minimum by 0.2."""
    asked: list[tuple[int, int]] = []

    def measure(octave: int, seed: int) -> float:
        asked.append((octave, seed))
        return (octave - true - 0.2 * (seed - 1)) ** 2 + seed

    grid = search_rates(measure, center, 2)
    best = grid.best(2)
    assert len(set(asked)) == len(asked), "no run is made twice"
    if cap:
        assert (best, max(octave for octave, _ in asked)) == (0, 0), "no rate above 1"
    else:
        assert grid.vertex() == pytest.approx(true + 0.1)
        assert [len(grid.losses[best + step]) for step in (-1, 0, 1)] == [2, 2, 2]
        assert len(asked) <= 5 + max(0, center - round(true)) + 4


def test_the_search_passes_a_minimum_beside_the_lowest():
    """The flat curve of Muon, standard, at width 256: from 2^-4 it falls to 2^-5, rises, and falls to 2^-8."""
    losses = dict(zip(range(-10, -1), (1.59, 1.564, 1.552, 1.554, 1.5672, 1.567, 1.583, 1.637, 1.965), strict=True))
    grid = search_rates(lambda octave, seed: losses[octave], -4, 1)
    assert (grid.best(1), sorted(grid.losses)) == (-8, sorted(losses))
