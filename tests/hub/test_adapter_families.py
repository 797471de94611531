"""Adapters of families whose files stack, weave or rename matrices: PEFT's adapter gives its logits here, and ours, of
some parts alone, gives ours in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llm_quest as quest
from llm_quest.techniques.lora import DoRA, LoRA
from tests.family_oracles import ORACLES
from tests.hub.test_load_adapter import perturb_, tokens, transformers_model
from tests.later import Later
from tests.oracles import ATOL, RTOL, save_published

peft = Later("peft")
CLOSE = {"rtol": RTOL, "atol": ATOL}
"""Of logits of transformers, whose norms run in float32."""
BASES = ("phi3", "gpt_neox", "cohere2", "stablelm, parallel", "glm4", "starcoder2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {name: save_published(ORACLES[name]().double(), home / name) for name in BASES}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("use_dora", [False, True])
@torch.no_grad()
def test_pefts_adapter_of_every_matrix_gives_its_logits_here_and_again_in_peft(bases, tmp_path, use_dora, name: str):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)
    other: Any = peft.get_peft_model(transformers_model(bases[name]), config)
    perturb_(other)
    other.eval().save_pretrained(tmp_path / "adapter")
    ours = quest.load(tmp_path / "adapter", dtype="float64")
    expected = other(tokens()).logits
    torch.testing.assert_close(ours(tokens()), expected, **CLOSE)
    quest.save_adapter(ours, tmp_path / "again", base=str(bases[name]))
    again = peft.PeftModel.from_pretrained(transformers_model(bases[name]), tmp_path / "again").eval()
    torch.testing.assert_close(again(tokens()).logits, expected, **CLOSE)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    "technique", [LoRA(2, targets=("q", "v")), DoRA(2, targets=("k", "down"))], ids=["lora", "dora"]
)
@torch.no_grad()
def test_our_adapter_of_some_parts_gives_its_logits_in_peft_and_again_here(bases, tmp_path, technique, name: str):
    ours = technique(quest.load(bases[name], dtype="float64"))
    perturb_(ours)
    expected = ours(tokens())
    quest.save_adapter(ours, tmp_path / "adapter", base=str(bases[name]))
    other = peft.PeftModel.from_pretrained(transformers_model(bases[name]), tmp_path / "adapter").eval()
    torch.testing.assert_close(other(tokens()).logits, expected, **CLOSE)
    torch.testing.assert_close(quest.load(tmp_path / "adapter", dtype="float64")(tokens()), expected, **CLOSE)
