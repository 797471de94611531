from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import llm_quest
from llm_quest.layers.initialize import copy_module, init_normal_, materialize
from llm_quest.models.build import build, build_meta_model, family_of, preset
from llm_quest.techniques import TECHNIQUES
from tests.laws.subjects import TINY

every_page = pytest.mark.parametrize("name", TINY)


@every_page
def test_the_seed_decides_the_weights_whatever_else_has_drawn_numbers(name: str):
    one = build(name, seed=3)
    torch.randn(7)
    again, other = build(name, seed=3), build(name, seed=4)
    for (path, a), b, c in zip(one.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), path
        assert a.dim() == 1 or path.endswith("bias") or not torch.equal(a, c), path


@every_page
def test_building_leaves_the_global_random_state_alone(name: str):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    build(name)
    assert torch.equal(torch.get_rng_state(), before)


@every_page
def test_nothing_is_left_uninitialized(name: str):
    """Memory full of NaN before the first values; none after."""
    config = preset(name).config
    model = materialize(build_meta_model(config), "cpu", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    family_of(config).initialize(model, torch.Generator().manual_seed(0))
    for path, parameter in model.named_parameters():
        assert parameter.isfinite().all(), path
    for path, buffer in model.named_buffers():
        assert buffer.isfinite().all(), path


@every_page
def test_a_tied_matrix_stays_one_parameter(name: str):
    whole, bare = build(name), build_meta_model(preset(name).config)
    assert [path for path, _ in whole.named_parameters()] == [path for path, _ in bare.named_parameters()]


@every_page
def test_a_skeleton_costs_no_memory(name: str):
    assert {parameter.device.type for parameter in build_meta_model(preset(name).config).parameters()} == {"meta"}


def test_what_writes_into_the_stream_starts_smaller():
    model = build("gpt2-tiny")
    for block in model.blocks:
        for matrix, std in (
            (block.mixer.layer.qkv, 0.02),
            (block.mixer.layer.out, 0.01),
            (block.feed_forward.layer.up, 0.02),
            (block.feed_forward.layer.down, 0.01),
        ):
            assert matrix.weight.std().item() == pytest.approx(std, rel=0.1)


def test_experts_write_into_the_stream_too():
    """Two layers, four branches: 0.02 / sqrt(4)."""
    for block in build("mixtral-tiny", seed=0).blocks:
        assert block.feed_forward.layer.experts.gate_up.std().item() == pytest.approx(0.02, rel=0.1)
        assert block.feed_forward.layer.experts.down.std().item() == pytest.approx(0.01, rel=0.1)


def test_a_layer_without_known_first_values_is_an_error_and_not_garbage():
    with pytest.raises(AssertionError, match="no initialization known for Conv1d"):
        init_normal_(nn.Sequential(nn.Conv1d(1, 1, 1)), std=0.02, out_std=0.02)


def test_dtype_and_device_are_those_asked_for():
    assert {p.dtype for p in build("gpt2-tiny", dtype="bfloat16").parameters()} == {torch.bfloat16}
    fine, coarse = build("gpt2-tiny"), build("gpt2-tiny", dtype=torch.bfloat16)
    assert torch.equal(fine.embed.token.weight.bfloat16(), coarse.embed.token.weight), "drawn once, in float32"


@pytest.mark.parametrize("name", ["multi_token", "hyper_connections", "lora", "dyt"])
def test_a_technique_on_a_fake_model_copies_no_fake_mode(name: str, monkeypatch: pytest.MonkeyPatch):
    """A copied FakeTensorMode shares weak references that each of the two frees."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: pytest.fail("copied"), raising=False)
    with FakeTensorMode() as mode:
        model = TECHNIQUES[name]()(materialize(build_meta_model(preset("gpt2-tiny").config), "cpu", torch.float32))
        copied = copy_module(model)
    assert {parameter.fake_mode for parameter in copied.parameters()} == {mode}


def test_a_copied_module_has_its_own_memory_and_keeps_what_is_shared():
    layer = nn.ModuleDict({"one": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    layer["same"] = layer["one"]
    layer["one"].bias.requires_grad_(False)
    copied = copy_module(layer)
    assert copied["same"] is copied["one"]
    assert copied["one"] is not layer["one"]
    assert not copied["one"].bias.requires_grad
    assert copied["one"].weight.requires_grad
    for (path, here), (there, other) in zip(layer.state_dict().items(), copied.state_dict().items(), strict=True):
        assert path == there
        assert torch.equal(here, other)
        assert here.data_ptr() != other.data_ptr()


def test_no_module_of_the_package_is_copied_with_deepcopy():
    allowed = {"layers/initialize.py", "cost/flops.py", "data/tokenizer.py", "data/control_tokens.py"}
    allowed |= {"recipes/yaml_io.py"}  # trees of settings
    package = Path(llm_quest.__file__).parent
    found = {str(f.relative_to(package)) for f in package.rglob("*.py") if "deepcopy(" in f.read_text(encoding="utf-8")}
    assert found <= allowed, f"copy_module instead of copy.deepcopy: {found - allowed}"


def test_models_that_differ_in_one_part_share_the_others():
    """With seed_per_module; from one stream a wider part moves the values of all that follow."""
    base = preset("llama3.2-tiny").config
    wider = replace(base, intermediate_size=2 * base.intermediate_size)
    for per_module in (True, False):
        one, other = (dict(build(c, seed=1, seed_per_module=per_module).named_parameters()) for c in (base, wider))
        matrices = {path: value for path, value in one.items() if value.dim() > 1}
        differing = {path for path, value in matrices.items() if not torch.equal(value, other[path])}
        assert ("blocks.1.mixer.layer.qkv.weight" in differing) != per_module
        assert any("feed_forward" in path for path in differing)
        outputs = [one[f"blocks.{number}.mixer.layer.out.weight"] for number in (0, 1)]
        assert not torch.equal(*outputs), "each module has a stream of its own"


def test_a_copy_shares_nothing_that_either_may_change():
    """Hooks, sets and dictionaries too, empty ones and others."""
    model = build("qwen3.5-tiny")
    model.head.register_forward_hook(lambda module, args, out: out + 1)
    model.blocks[0].shared = model.blocks[1].shared = {}
    copied = copy_module(model)
    for part, other in zip(model.modules(), copied.modules(), strict=True):
        for name, value in vars(part).items():
            if isinstance(value, dict | list | set):
                assert type(vars(other)[name]) is type(value)
                assert vars(other)[name] is not value, name
                assert vars(other)[name].keys() == value.keys() if isinstance(value, dict) else True
    assert copied.blocks[0].shared is copied.blocks[1].shared, "one object stays one"
    tokens = torch.tensor([[3, 1, 4]])
    torch.testing.assert_close(copied(tokens), model(tokens), rtol=0, atol=0)
    copied.head._forward_hooks.clear()
    torch.testing.assert_close(copied(tokens) + 1, model(tokens), rtol=0, atol=0)
