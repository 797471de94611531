from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, build_meta_model, count_parameters, family_of, preset, presets
from llm_quest.train.newton_schulz import orthogonalize
from llm_quest.train.optimizers import make_muon

PUBLISHED = [preset for page in FAMILIES for preset in page.presets if preset.num_parameters is not None]
COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_size_has_the_published_number_of_parameters(name: str):
    assert count_parameters(build_meta_model(preset(name).config)) == COUNTS[name]


@pytest.mark.parametrize("size", PUBLISHED, ids=lambda preset: preset.name)
def test_every_preset_has_as_many_parameters_as_it_says(size):
    assert count_parameters(build_meta_model(size.config)) == size.num_parameters


@pytest.mark.parametrize("page", FAMILIES, ids=lambda page: page.name)
def test_every_published_size_says_where_it_comes_from(page):
    for size in page.presets:
        assert size.name.endswith("-tiny") or (size.hub_id and size.num_parameters), size.name


def test_presets_have_names_of_their_own():
    assert len(set(presets())) == len(presets())


def test_a_mistyped_name_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"no preset is called 'lama3.2-tiny'; did you mean 'llama3.2-tiny'\?"):
        build("lama3.2-tiny")


def test_a_name_like_no_other_is_answered_with_all_of_them():
    with pytest.raises(UsageError, match="known: gpt2, gpt2-medium"):
        build("zzzzzz")


def test_a_config_is_built_as_it_is():
    config = replace(preset("gpt2-tiny").config, num_hidden_layers=3)
    assert len(build(config).blocks) == 3
    assert build(config).config is config


def test_something_that_is_no_config_is_refused():
    with pytest.raises(UsageError, match=r"dict is no family's Config; families: gpt2, llama"):
        build({"vocab": 3})


def test_an_unknown_dtype_is_refused_and_the_known_ones_listed():
    with pytest.raises(UsageError, match=r"no dtype is called 'float33'.*float32"):
        build("gpt2-tiny", dtype="float33")


def test_a_model_comes_in_eval_mode_and_on_the_card_stands_what_it_is():
    model = build("llama3.2-tiny")
    assert not model.training
    assert model.spec.family == "llama"
    assert family_of(model.config).name == "llama"
    assert model.spec.techniques == ()


def test_row_splits_name_every_stacked_matrix():
    model = build("llama3.2-tiny")
    splits = model.row_splits()
    assert splits["blocks.0.mixer.layer.qkv.weight"] == (64, 32, 32)
    assert splits["blocks.1.feed_forward.layer.gate_up.weight"] == (96, 96)
    shapes = dict(model.named_parameters())
    assert all(sum(rows) == shapes[path].shape[-2] for path, rows in splits.items())
    assert isinstance(shapes["norm.weight"], torch.nn.Parameter)


def test_muon_turns_each_experts_gate_up_and_down_by_itself():
    """And a convolution is no matrix: its channels know nothing of each other."""
    model = build("qwen3-next-tiny").train()
    assert model.row_splits()["blocks.0.feed_forward.layer.experts.gate_up"] == (32, 32)
    assert model.row_splits()["blocks.0.feed_forward.layer.experts.down"] == (48,)
    experts = model.blocks[0].feed_forward.layer.experts
    model(torch.arange(64)[None]).square().mean().backward()
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    optimizer = make_muon(model, lr=1.0, weight_decay=0.0, momentum=0.0, row_splits=model.row_splits())
    optimizer.step()
    gate_up, down = experts.gate_up.grad, experts.down.grad
    alone = {
        "gate_up": torch.stack([torch.cat([orthogonalize(part) for part in one.chunk(2)]) for one in gate_up]),
        "down": torch.stack([orthogonalize(one) for one in down]),
    }
    for name, p in experts.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), alone[name], atol=6e-2, rtol=0)
    assert "momentum" not in optimizer.state[model.blocks[0].mixer.layer.conv]
