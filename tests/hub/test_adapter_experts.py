"""Adapters of experts, which PEFT edits as one parameter a layer (`target_parameters`): PEFT's gives its logits here,
and ours, of some parts alone, gives ours in PEFT."""

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

import llm_quest as quest
from llm_quest.errors import DataError
from llm_quest.hub.float64 import computing_in_float64
from llm_quest.hub.published_matrices import LoRAPair, flatten_experts, stack_experts_pair
from llm_quest.techniques.adapter_merge import merge_adapter
from llm_quest.techniques.lora import LoRA, LoRAXS, RsLoRA, TinyLoRA
from tests.family_oracles import ORACLES
from tests.hub.test_load_adapter import perturb_, tokens
from tests.later import Later
from tests.oracles import save_published, transformers

peft = Later("peft")
pytestmark = pytest.mark.usefixtures("without_model_cards")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
BASES = ("gpt_oss", "qwen3_moe", "mixtral", "deepseek_v2", "qwen2_moe", "olmoe", "mimo_v2_flash", "qwen3_next")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(autouse=True)
def wholly_in_float64() -> Iterator[None]:
    """In float32 a DeltaNet hybrid magnifies rounding beyond any bound that shows a mistake. PEFT draws A from torch's
    generator."""
    torch.manual_seed(0)
    with computing_in_float64():
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {name: save_published(ORACLES[name]().double(), home / name.replace(",", "")) for name in BASES}


@functools.cache
def read_base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager", attn_implementation="eager"
    )


def transformers_model(folder: Path) -> Any:
    """A copy of the published model: PEFT edits it in place."""
    return copy.deepcopy(read_base(folder))


@functools.cache
def base_logits(folder: Path) -> torch.Tensor:
    return logits(read_base(folder))


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("stacks", [STACKS, STACKS[:1], STACKS[1:]], ids=["both", "gate_up", "down"])
@torch.no_grad()
def test_pefts_adapter_of_experts_gives_its_logits_here_and_again_in_peft(bases, tmp_path, stacks, name: str):
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["o_proj"], target_parameters=stacks, task_type="CAUSAL_LM"
    )
    other: Any = peft.get_peft_model(transformers_model(bases[name]), config)
    perturb_(other)
    other.eval().save_pretrained(tmp_path / "adapter")
    ours = quest.load(tmp_path / "adapter", dtype="float64")
    expected = logits(other)
    assert (expected - base_logits(bases[name])).abs().max() > 0.1
    torch.testing.assert_close(ours(tokens()), expected, **CLOSE)
    quest.save_adapter(ours, tmp_path / "again", base=str(bases[name]))
    again = peft.PeftModel.from_pretrained(transformers_model(bases[name]), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), expected, **CLOSE)


SINGLE = {
    "mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    **dict.fromkeys(
        ("qwen3_moe", "deepseek_v2", "qwen2_moe", "olmoe", "mimo_v2_flash", "qwen3_next"),
        tuple(f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")),
    ),
}
"""Base -> the modules of one expert, as transformers 4 has them."""


def single_experts_adapter(base: Path, folder: Path, modules: tuple[str, ...], **overrides: Any) -> dict[str, Any]:
    """An adapter as PEFT writes it for such modules, of the second layer that has experts; expert 2 has none, expert 1
    another rank and alpha. Gives the published tensors with the adapter merged into them."""
    held, tensors = safetensors.torch.load_file(base / "model.safetensors"), {}
    layer = sorted({name.split(".")[2] for name in held if ".experts.1." in name})[-1]
    for number in (0, 1, 3):
        for module in modules:
            name, rank = f"model.layers.{layer}.{module.format(number)}", 3 if number == 1 else 2
            weight = held[f"{name}.weight"]
            A, B = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
            held[f"{name}.weight"] = weight + B @ A * ((9 if number == 1 else 4) / rank)
            tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), "lora_dropout": 0.0,
        "target_modules": [module.rpartition(".")[2] for module in modules], "task_type": "CAUSAL_LM",
        "rank_pattern": {r".*experts\.1\..*": 3}, "alpha_pattern": {r".*experts\.1\..*": 9}, **overrides,
    }  # fmt: skip
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return held


@pytest.mark.parametrize("name", SINGLE)
@torch.no_grad()
def test_an_adapter_of_single_experts_is_the_model_with_its_products_added(bases, tmp_path, name: str):
    """transformers 4 has a module for each expert, and PEFT a pair for each; the oracle is the merged base."""
    held = single_experts_adapter(bases[name], tmp_path / "adapter", SINGLE[name])
    ours, base = quest.load(tmp_path / "adapter", dtype="float64"), quest.load(bases[name], dtype="float64")
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "config.json").write_text((bases[name] / "config.json").read_text())
    safetensors.torch.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    expected = quest.load(folder, dtype="float64")(tokens())
    assert (expected - base(tokens())).abs().max() > 0.01
    torch.testing.assert_close(ours(tokens()), expected, **CLOSE)
    merge_adapter(ours)
    torch.testing.assert_close(ours(tokens()), expected, **CLOSE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"init_lora_weights": "pissa"}, r"experts\.\d.* is adapted by pissa; of single experts only LoRA is read"),
        ({"rank_pattern": {}}, r"experts\.1.* has rank 3, r and rank_pattern make it 2: the files do not fit"),
        ({"cut": 1}, r"is an adapter of another base: at .*experts\.\d"),
    ],
)
def test_what_single_experts_cannot_have_is_named(bases, tmp_path, overrides: dict[str, Any], message: str):
    folder, cut = tmp_path / "a", overrides.pop("cut", 0)
    single_experts_adapter(bases["olmoe"], folder, SINGLE["olmoe"], **overrides)
    if cut:
        held = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        narrow = {name: one[:, cut:].contiguous() if "lora_A" in name else one for name, one in held.items()}
        safetensors.torch.save_file(narrow, folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match=message):
        quest.load(folder)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    "technique",
    [
        LoRA(2, targets=("q", "experts.up", "experts.down")),
        RsLoRA(2, targets=("experts.gate",)),
        LoRA(2, targets=("experts.gate", "experts.up")),
    ],
    ids=["up and down", "gate", "gate and up"],
)
@torch.no_grad()
def test_our_adapter_of_some_parts_gives_its_logits_in_peft_and_again_here(bases, tmp_path, technique, name: str):
    if name in ("deepseek_v2", "qwen3_next") and "q" in technique.targets:
        technique = LoRA(2, targets=("experts.up", "experts.down"))
    ours = technique(quest.load(bases[name], dtype="float64"))
    perturb_(ours)
    expected = ours(tokens())
    quest.save_adapter(ours, tmp_path / "adapter", base=str(bases[name]))
    other = peft.PeftModel.from_pretrained(transformers_model(bases[name]), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(other), expected, **CLOSE)
    torch.testing.assert_close(quest.load(tmp_path / "adapter", dtype="float64")(tokens()), expected, **CLOSE)
    merge_adapter(ours)
    torch.testing.assert_close(ours(tokens()), expected, **CLOSE)


@pytest.mark.parametrize("technique", [LoRAXS(2, std=0.3), TinyLoRA(2, u=3)], ids=["lora_xs", "tiny_lora"])
@torch.no_grad()
def test_what_stands_between_a_and_b_goes_into_b_of_every_expert(bases, tmp_path, technique):
    ours = technique(quest.load(bases["mixtral"], dtype="float64"))
    perturb_(ours)
    quest.save_adapter(ours, tmp_path / "adapter", base=str(bases["mixtral"]))
    other = peft.PeftModel.from_pretrained(transformers_model(bases["mixtral"]), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(other), ours(tokens()), **CLOSE)


def test_the_experts_number_runs_slowest_in_a_and_fastest_in_b():
    """Two experts of rank 2: A's rows are a00 a01 a10 a11, B's columns b00 b10 b01 b11."""
    A = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    B = torch.tensor([[0.0, 10.0, 1.0, 11.0]])
    stacked = stack_experts_pair(LoRAPair(A, B), 2)
    assert stacked.A.tolist() == [[[0.0], [1.0]], [[10.0], [11.0]]]
    assert stacked.B.tolist() == [[[0.0, 1.0]], [[10.0, 11.0]]]
    assert stacked.rank == 2
    again = flatten_experts(stacked)
    assert torch.equal(again.A, A)
    assert torch.equal(again.B, B)


def adapter(bases: dict[str, Path], folder: Path) -> Path:
    model = LoRA(2, targets=("experts.gate", "experts.down"))(quest.load(bases["mixtral"], dtype="float64"))
    return quest.save_adapter(model, folder / "adapter", base=str(bases["mixtral"]))


def test_a_config_that_names_other_parameters_than_the_file_holds_is_refused(bases, tmp_path):
    folder = adapter(bases, tmp_path)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    file.write_text(json.dumps(config | {"target_parameters": ["mlp.experts.down_proj"]}))
    with pytest.raises(DataError, match=r"names 1 parameters of model\.layers\.\d\.mlp\.experts, the file adapts 2"):
        quest.load(folder)


def test_an_adapter_of_other_experts_is_refused(bases, tmp_path):
    folder = adapter(bases, tmp_path)
    file = folder / "adapter_model.safetensors"
    held = safetensors.torch.load_file(file)
    name = next(name for name in held if name.endswith("experts.lora_A.weight"))
    safetensors.torch.save_file(held | {name: held[name][:-1].contiguous()}, file)
    with pytest.raises(DataError, match=r"adapter of another base: at .*down_proj it maps"):
        quest.load(folder)
