"""The pairs of techniques that people combine: together neutral at birth, trained, saved and loaded."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llm_quest as quest
from llm_quest.data.batch import TokenBatch
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.scope import Scope
from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing
from llm_quest.techniques.attention_taps import AttentionTaps
from llm_quest.techniques.context_extension import ContextExtension
from llm_quest.techniques.dynamic_tanh import DyT
from llm_quest.techniques.hyper_connections import HyperConnections
from llm_quest.techniques.lora import LoRA
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.techniques.softcap import SoftCap
from llm_quest.train.optimizers import make_muon
from tests.laws.subjects import random_tokens, randomize_


def llama() -> Decoder:
    return build(
        replace(preset("llama3.2-tiny").config, rotary=RotaryEmbedding(16, 10_000.0), max_position_embeddings=64)
    )


MODELS: dict[str, Any] = {
    "llama": llama,
    "gpt2": lambda: build("gpt2-tiny"),
    "mixtral": lambda: build("mixtral-tiny"),
    "qwen3": lambda: build("qwen3-tiny"),
    "deepseek": lambda: build("deepseek-v3-tiny"),
}
PAIRS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "LoRA, then YaRN": ("llama", (LoRA(rank=2), ContextExtension(1.0))),
    "YaRN, then LoRA": ("qwen3", (ContextExtension(1.0), LoRA(rank=2))),
    "hyper-connections, then MTP": ("llama", (HyperConnections(2), MultiTokenPrediction())),
    "MTP, then hyper-connections": ("gpt2", (MultiTokenPrediction(), HyperConnections(3, "manifold"))),
    "LoRA on experts": ("mixtral", (LoRA(rank=2, targets=("gate", "down")), AttentionTaps())),
    "LoRA on MLA and shared experts": ("deepseek", (LoRA(rank=2), ActivationCheckpointing())),
    "MTP, then LoRA": ("llama", (MultiTokenPrediction(), LoRA(rank=2))),
    "hyper-connections, then LoRA": ("llama", (HyperConnections(2, "lite"), LoRA(rank=2))),
    "QK-Clip and hyper-connections": ("gpt2", (QKClip(), HyperConnections(2))),
}
NEUTRAL = {"rtol": 0.0, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 1e-10}


def plain_and_edited(pair: str) -> tuple[Decoder, Decoder]:
    """The plain model and the edited one, in float64."""
    name, techniques = PAIRS[pair]
    plain = randomize_(MODELS[name]()).double()
    model = copy.deepcopy(plain)
    for technique in techniques:
        model = technique(model)
    return plain, model


@pytest.mark.parametrize("pair", PAIRS)
def test_together_they_move_no_logit_at_birth_train_and_survive_a_save(pair: str, tmp_path: Path):
    plain, model = plain_and_edited(pair)
    tokens = random_tokens(plain, 3, 12)
    torch.testing.assert_close(model(tokens), plain(tokens), **NEUTRAL)
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:])
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(learned, 1e-2), []
    for _ in range(4):
        loss = NextTokenLoss(model.train())(batch)
        losses.append(loss.total.item())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    again = quest.load(quest.save(model, tmp_path / "model"))
    torch.testing.assert_close(again(tokens), model(tokens), **EXACT)
    assert again.spec == model.spec
    cache = model.new_cache(3, 12)
    first = model(tokens[:, :7], Scope.unpadded(tokens[:, :7], cache=cache))
    rest = model(tokens[:, 7:], Scope.unpadded(tokens[:, 7:], cache=cache, start=7))
    torch.testing.assert_close(torch.cat((first, rest), dim=1), model(tokens), **EXACT)


@pytest.mark.parametrize("page", ["gpt2-tiny", "llama3.2-tiny"])
def test_qk_clip_with_muon_is_muonclip(page: str):
    """At a rate that makes the logits grow without it, they stay near tau with it: a step's growth above it at most."""
    tau, largest = 0.1, {}
    for clips in (True, False):
        model = build(page).train()
        clip = QKClip(tau if clips else 1e9)
        clip(model)
        tokens = random_tokens(model, 4, 17)
        batch = TokenBatch(tokens[:, :-1], tokens[:, 1:])
        optimizer = make_muon(model, lr=0.03, row_splits=model.row_splits(), weight_decay=0.0)
        told = []
        for step in range(9):
            loss = NextTokenLoss(model)(batch)
            optimizer.zero_grad()
            (loss.total / loss.count).backward()
            optimizer.step()
            told.append(clip.on_step_end(model, step)["max_logit"])
        largest[clips] = max(told[-4:])
    assert largest[True] < 3 * tau, largest
    assert largest[False] > 2 * largest[True], largest


@pytest.mark.filterwarnings("ignore:softcap")
def test_a_cap_and_dyt_and_a_second_adapter_of_the_length_stand_together(tmp_path: Path):
    model = ContextExtension(4.0)(SoftCap(2.0, 3.0)(DyT()(randomize_(llama()).double())))
    tokens = random_tokens(model, 2, 20)
    again = quest.load(quest.save(model, tmp_path / "model"))
    torch.testing.assert_close(again(tokens), model(tokens), **EXACT)
    assert again.spec == model.spec
    assert model(tokens).abs().max() < 3.0


def test_qk_clip_over_an_adapter_is_refused_with_the_remedy():
    model: nn.Module = LoRA(rank=2)(build("gpt2-tiny"))
    with pytest.raises(ValueError, match="merge the adapter first"):
        QKClip()(model)
