"""Adapters of experts, which PEFT edits as one parameter a layer (`target_parameters`): PEFT's gives its logits here,
and ours, of some parts alone, gives ours in PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import llm_quest as quest
from llm_quest.errors import DataError
from llm_quest.hub.published_matrices import LoRAPair, flatten_experts, stack_experts_pair
from llm_quest.techniques.lora import LoRA, LoRAXS, RsLoRA, TinyLoRA, merge_adapter
from tests.family_oracles import ORACLES
from tests.float64 import computing_in_float64
from tests.hub.test_load_adapter import stir, tokens
from tests.later import Later
from tests.oracles import save_published, transformers

peft = Later("peft")
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


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager", attn_implementation="eager"
    )


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("stacks", [STACKS, STACKS[:1], STACKS[1:]], ids=["both", "gate_up", "down"])
@torch.no_grad()
def test_pefts_adapter_of_experts_gives_its_logits_here_and_again_in_peft(bases, tmp_path, stacks, name: str):
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["o_proj"], target_parameters=stacks, task_type="CAUSAL_LM"
    )
    other: Any = peft.get_peft_model(theirs(bases[name]), config)
    stir(other)
    other.eval().save_pretrained(tmp_path / "adapter")
    ours = quest.load(tmp_path / "adapter", dtype="float64")
    expected = logits(other)
    assert (expected - logits(theirs(bases[name]))).abs().max() > 0.1
    torch.testing.assert_close(ours(tokens()), expected, **CLOSE)
    quest.save_adapter(ours, tmp_path / "again", base=str(bases[name]))
    again = peft.PeftModel.from_pretrained(theirs(bases[name]), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), expected, **CLOSE)


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
    stir(ours)
    expected = ours(tokens())
    quest.save_adapter(ours, tmp_path / "adapter", base=str(bases[name]))
    other = peft.PeftModel.from_pretrained(theirs(bases[name]), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(other), expected, **CLOSE)
    torch.testing.assert_close(quest.load(tmp_path / "adapter", dtype="float64")(tokens()), expected, **CLOSE)
    merge_adapter(ours)
    torch.testing.assert_close(ours(tokens()), expected, **CLOSE)


@pytest.mark.parametrize("technique", [LoRAXS(2, std=0.3), TinyLoRA(2, u=3)], ids=["lora_xs", "tiny_lora"])
@torch.no_grad()
def test_what_stands_between_a_and_b_goes_into_b_of_every_expert(bases, tmp_path, technique):
    ours = technique(quest.load(bases["mixtral"], dtype="float64"))
    stir(ours)
    quest.save_adapter(ours, tmp_path / "adapter", base=str(bases["mixtral"]))
    other = peft.PeftModel.from_pretrained(theirs(bases["mixtral"]), tmp_path / "adapter").eval()
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
