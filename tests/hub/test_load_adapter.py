"""Adapters in PEFT's format: what we write, peft reads, with the same numbers; and the other way round."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

import llm_quest as quest
from llm_quest.errors import DataError, UsageError
from llm_quest.layers.low_rank import AdaptedLinear, DoRAUpdate, adapter_layers
from llm_quest.techniques.adapter_merge import merge_adapter
from llm_quest.techniques.lora import DoRA, LoRA, LoRAXS, RsLoRA, TinyLoRA, adapter_addresses
from tests.later import Later
from tests.oracles import ATOL, RTOL, save_published, tiny_gpt2, tiny_llama, transformers

peft = Later("peft")
CLOSE = {"rtol": 0.0, "atol": 1e-6}
BASES = {"llama": lambda: tiny_llama(attention_bias=True), "gpt2": tiny_gpt2}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj", "gate_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {name: save_published(make().double(), home / name) for name, make in BASES.items()}


@functools.cache
def read_base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def transformers_model(folder: Path) -> Any:
    """A copy of the published model: PEFT edits it in place."""
    return copy.deepcopy(read_base(folder))


def tokens() -> Tensor:
    return torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(3))


def perturb_(model: torch.nn.Module) -> None:
    """Learned numbers away from their first values (B is zero there)."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def learn(logits: Tensor) -> None:
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()


def peft_model(base: Path, kind: str, name: str, **more: Any) -> Any:
    more |= {"fan_in_fan_out": name == "gpt2"}
    config = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=TARGETS[name], task_type="CAUSAL_LM", **(KINDS[kind] | more)
    )
    adapted = peft.get_peft_model(transformers_model(base), config)
    perturb_(adapted)
    return adapted.eval()


def pairs(ours: Any, other: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Our wrapped layers and peft's, each with the published modules that our parts are, in our order."""
    inside = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    inside |= {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    fused = {"qkv": "attn.c_attn", "up": "mlp.c_fc"}
    for path, wrapper in adapter_layers(ours).items():
        index, layer = path.split(".")[1], path.rsplit(".", 1)[-1]
        if name == "gpt2":
            yield wrapper, [other.get_submodule(f"base_model.model.transformer.h.{index}.{fused[layer]}")]
        else:
            parts = [layer] if isinstance(wrapper, AdaptedLinear) else wrapper.parts
            home = f"base_model.model.model.layers.{index}."
            yield wrapper, [other.get_submodule(home + inside[part]) for part in parts]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_adapter_gives_the_same_outputs_gradients_and_merged_model_here(bases, tmp_path, kind: str, name: str):
    other = peft_model(bases[name], kind, name)
    other.save_pretrained(tmp_path / "adapter")
    ours = quest.load(tmp_path / "adapter", dtype="float64")
    torch.testing.assert_close(ours(tokens()), other(tokens()).logits, rtol=RTOL, atol=ATOL)
    for wrapper, modules in pairs(ours, other, name):
        same_layer(wrapper, modules)
    merge_adapter(ours)
    merged = other.merge_and_unload()
    quest.save(ours, tmp_path / "merged")
    mine, reference = transformers_model(tmp_path / "merged").state_dict(), merged.state_dict()
    assert mine.keys() == reference.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], reference[key], **CLOSE)


def layer_edits(layer: Any) -> list[Any]:
    return [layer.edit] if isinstance(layer, AdaptedLinear) else list(layer.edits.values())


def same_layer(wrapper: Any, modules: list[Any]) -> None:
    """Output and gradients on the same random input. A published matrix that we edit in parts has one A for all of
    them, whose gradient is the sum of ours."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, modules[0].in_features, generator=generator, dtype=torch.float64)
    whole = isinstance(wrapper, AdaptedLinear)
    edits = [wrapper.edit] if isinstance(wrapper, AdaptedLinear) else list(wrapper.edits.values())
    mine = wrapper(x) if whole else torch.cat(wrapper(x), dim=-1)
    their = torch.cat([module(x) for module in modules], dim=-1)
    torch.testing.assert_close(mine, their, **CLOSE)
    weigh = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
    (mine * weigh).sum().backward()
    (their * weigh).sum().backward()
    lows = [edit.low if isinstance(edit, DoRAUpdate) else edit for edit in edits]
    found = [module for module in modules if isinstance(module, peft.tuners.lora.LoraLayer)]
    As, Bs = [low.A.grad for low in lows], [low.B.grad for low in lows]
    expected_A = torch.cat([module.lora_A["default"].weight.grad for module in found])
    expected_B = torch.cat([module.lora_B["default"].weight.grad for module in found])
    torch.testing.assert_close(sum(As) if len(found) < len(As) else torch.cat(As), expected_A, **CLOSE)
    torch.testing.assert_close(torch.cat(Bs), expected_B, **CLOSE)
    if found[0].lora_magnitude_vector:
        magnitudes = torch.cat([edit.magnitude.grad for edit in edits])
        expected = torch.cat([module.lora_magnitude_vector["default"].weight.grad for module in found])
        torch.testing.assert_close(magnitudes, expected, **CLOSE)


OURS = {
    "lora": LoRA(rank=3, alpha=7.0, targets=("q", "v", "down")),
    "rslora": RsLoRA(rank=3, alpha=7.0, targets=("q", "out")),
    "dora": DoRA(rank=2, alpha=5.0),
    "dora, parts of a matrix": DoRA(rank=2, alpha=5.0, targets=("q", "v")),
    "one layer": LoRA(rank=2, targets=("blocks.1.mixer.layer.out",)),
    "lora_xs": LoRAXS(rank=4, scale=0.5, std=0.3),
    "tiny_lora": TinyLoRA(rank=2, u=5, tying=1.0),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", OURS)
def test_our_adapter_gives_the_same_logits_in_peft_and_again_here(bases, tmp_path, kind: str, name: str):
    ours = OURS[kind](quest.load(bases[name], dtype="float64"))
    perturb_(ours)
    quest.save_adapter(ours, tmp_path / "adapter", base=str(bases[name]))
    read = peft.PeftModel.from_pretrained(transformers_model(bases[name]), tmp_path / "adapter").eval()
    expected = ours(tokens())
    assert (expected - quest.load(bases[name], dtype="float64")(tokens())).abs().max() > 1e-2
    torch.testing.assert_close(read(tokens()).logits, expected, rtol=RTOL, atol=ATOL)
    again = quest.load(tmp_path / "adapter", dtype="float64")
    torch.testing.assert_close(again(tokens()), expected, **CLOSE)
    assert set(adapter_addresses(again)) >= set(adapter_addresses(ours))


def test_an_adapter_that_is_born_neutral_is_read_back_too(bases, tmp_path):
    ours = LoRA(rank=2, targets=("q", "k"))(quest.load(bases["gpt2"]))
    again = quest.load_adapter(quest.load(bases["gpt2"]), quest.save_adapter(ours, tmp_path / "adapter"))
    torch.testing.assert_close(again(tokens()), ours(tokens()))


def test_tiny_lora_equals_pefts_with_pefts_own_projections(bases):
    config = peft.TinyLoraConfig(r=2, u=5, weight_tying=0.5, target_modules=["q_proj", "v_proj", "down_proj"])
    other = peft.get_peft_model(transformers_model(bases["llama"]), config)
    perturb_(other)
    ours = TinyLoRA(rank=2, u=5, tying=0.5, targets=("q", "v", "down"))(quest.load(bases["llama"], dtype="float64"))
    inside = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}
    vectors = {}
    for address in adapter_addresses(ours):
        index, part = address.split(".")[1], address.rsplit(".", 1)[-1]
        module = other.get_submodule(f"base_model.model.model.layers.{index}.{inside[part]}")
        wrapper = ours.get_submodule(address if part == "down" else address.rsplit(".", 1)[0])
        edit = wrapper.edit if part == "down" else wrapper.edits[part]
        v = module.tinylora_v["default"][module._tinylora_v_key["default"]]
        with torch.no_grad():
            torch.testing.assert_close(edit.core.P, module.tinylora_P["default"].double(), rtol=0, atol=1e-6)
            for mine, their in ((edit.A, module.tinylora_A), (edit.B, module.tinylora_B)):
                mine.copy_(their["default"])
            edit.core.P.copy_(module.tinylora_P["default"])
            edit.core.v.copy_(v)
        vectors[id(edit.core.v)] = (edit.core.v, v)
        torch.testing.assert_close(edit.delta_weight(), module.get_delta_weight("default"), **CLOSE)
    assert len(vectors) == len(other.base_model.tinylora_v["default"]) == 3
    logits, expected = ours(tokens()), other(tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=RTOL, atol=ATOL)
    learn(logits)
    learn(expected)
    for mine, their in vectors.values():
        torch.testing.assert_close(mine.grad, their.grad, **CLOSE)


def tiny(base: Path, folder: Path, name: str = "llama", **more: Any) -> Any:
    """PEFT's TinyLoRA of a base, stirred and saved."""
    targets = {"llama": ["q_proj", "v_proj", "up_proj", "down_proj"], "gpt2": ["c_fc"]}[name]
    numbers = {"r": 2, "u": 5, "target_modules": targets, "projection_seed": 7, "fan_in_fan_out": name == "gpt2"}
    other = peft.get_peft_model(transformers_model(base), peft.TinyLoraConfig(**(numbers | more)))
    perturb_(other)
    other.save_pretrained(folder)
    return other.eval()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("tying", [0.0, 0.6, 1.0])
def test_pefts_tiny_lora_gives_the_same_outputs_and_gradients_here(bases, tmp_path, tying: float, name: str):
    other = tiny(bases[name], tmp_path / "adapter", name, weight_tying=tying)
    ours = quest.load(tmp_path / "adapter", dtype="float64")
    (technique,) = ours.spec.techniques
    assert (technique.rank, technique.u, technique.tying, technique.seed) == (2, 5, tying, 7)
    logits, expected = ours(tokens()), other(tokens()).logits
    assert (expected - quest.load(bases[name], dtype="float64")(tokens())).abs().max() > 1e-2
    torch.testing.assert_close(logits, expected, **CLOSE)
    learn(logits)
    learn(expected)
    mine = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    their = other.base_model.tinylora_v["default"]
    assert len(mine) == len(their)
    for number, parameter in enumerate(mine):
        torch.testing.assert_close(parameter.grad, their[str(number)].grad, **CLOSE)
    quest.save(ours, tmp_path / "ours")
    torch.testing.assert_close(quest.load(tmp_path / "ours", dtype="float64")(tokens()), logits, **CLOSE)
    quest.save_adapter(ours, tmp_path / "as lora", base=str(bases[name]))
    read = peft.PeftModel.from_pretrained(transformers_model(bases[name]), tmp_path / "as lora").eval()
    torch.testing.assert_close(read(tokens()).logits, logits, rtol=RTOL, atol=ATOL)


def test_a_tiny_lora_whose_vectors_cannot_be_placed_is_refused(bases, tmp_path):
    tiny(bases["llama"], folder := tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    held = safetensors.torch.load_file(file)
    first, second = [name for name in sorted(held) if name.endswith("tinylora_P")][:2]

    def require_refusal(said: str, **changes: Tensor | None) -> None:
        safetensors.torch.save_file({n: t for n, t in (held | changes).items() if t is not None}, file)
        with pytest.raises(DataError, match=said):
            quest.load_adapter(model := quest.load(bases["llama"]), folder)
        assert not adapter_layers(model)

    require_refusal("not those of seed 7 at place", **{first: held[second], second: held[first]})
    require_refusal("save_projection=True", **{first: None})
    require_refusal("7 vectors; 8 of u 5", **{"base_model.tinylora_v.3": None})
    require_refusal("another size: tinylora_P", **{first: held[first][:3].clone()})
    require_refusal("not read here: base_model.x", **{"base_model.x": held[first].clone()})
    safetensors.torch.save_file(held, file)
    rewrite(folder, tinylora_dropout=0.1)
    with pytest.raises(DataError, match="tinylora_dropout"):
        quest.load(folder)
    rewrite(folder, tinylora_dropout=0.0, u="five")
    with pytest.raises(DataError, match="u 'five'"):
        quest.load(folder)
    tiny(bases["gpt2"], tmp_path / "parts", "gpt2", target_modules=["c_attn"])
    with pytest.raises(DataError, match="edited here in parts"):
        quest.load(tmp_path / "parts")


def adapter(bases, tmp_path: Path) -> Path:
    ours = LoRA(rank=2, targets=("q",))(quest.load(bases["llama"]))
    return quest.save_adapter(ours, tmp_path / "adapter", base=str(bases["llama"]))


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"lora_bias": True}, r"lora_bias \(True\) is not computed here"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication \(\[\[0, 2\]\]\) is not computed here"),
        ({"r": 3}, "rank"),
        ({"r": "two"}, "a positive whole number"),
        ({"base_model_name_or_path": None}, "does not say of which model"),
    ],
)
def test_a_setting_that_is_not_computed_here_is_refused(bases, tmp_path, changes: dict, said: str):
    folder = adapter(bases, tmp_path)
    rewrite(folder, **changes)
    with pytest.raises((DataError, UsageError), match=said):
        quest.load(folder)


def test_an_adapter_of_another_base_is_refused(bases, tmp_path):
    folder = adapter(bases, tmp_path)
    with pytest.raises(DataError, match=r"adapter of another base: this model has no model\.layers"):
        quest.load_adapter(quest.load(bases["gpt2"]), folder)
    narrow = save_published(tiny_llama(hidden_size=32), tmp_path / "narrow")
    with pytest.raises(DataError, match=r"another base: at .* it maps 64 to 96 numbers, this model 32 to 96"):
        quest.load_adapter(quest.load(narrow), folder)


def test_damaged_weights_are_named(bases, tmp_path):
    folder = adapter(bases, tmp_path)
    held = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    first = next(name for name in held if "lora_A" in name)
    safetensors.torch.save_file({n: t for n, t in held.items() if n != first}, folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match="lora_A or lora_B is missing"):
        quest.load(folder)
    safetensors.torch.save_file(held | {first: held[first] * torch.nan}, folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match="not finite"):
        quest.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no adapter_model\.safetensors"):
        quest.load(folder)


def test_what_peft_has_no_form_for_is_refused(bases, tmp_path):
    with pytest.raises(UsageError, match="has no adapter"):
        quest.save_adapter(quest.load(bases["llama"]), tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"experts.* merge"):
        quest.save_adapter(DoRA()(quest.build("mixtral-tiny")), tmp_path / "adapter")
    with pytest.raises(UsageError, match="has an adapter already"):
        quest.load_adapter(LoRA()(quest.load(bases["llama"])), adapter(bases, tmp_path))
