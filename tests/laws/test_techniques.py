"""The promises of `contracts.Technique`: every technique on every page, in float64 and with every tensor random.

A technique may refuse a page; then the pair stands in `REFUSED`, and its reason is a property of the mathematics."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llm_quest as quest
from llm_quest.data.batch import TokenBatch
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.scope import Scope
from llm_quest.techniques import TECHNIQUES, TRAINING_TECHNIQUES
from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing
from llm_quest.techniques.attention_taps import AttentionTaps
from llm_quest.techniques.context_extension import ContextExtension
from llm_quest.techniques.dynamic_tanh import DyT
from llm_quest.techniques.hyper_connections import HyperConnections
from llm_quest.techniques.lora import DoRA, LoRA, LoRAXS, RsLoRA, TinyLoRA
from llm_quest.techniques.model_spec import techniques_from_json, techniques_to_json
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from llm_quest.techniques.neftune import NEFTune
from llm_quest.techniques.qk_clip import QKClip
from llm_quest.techniques.quantize import Quantize
from llm_quest.techniques.score_head import ScoreHead
from llm_quest.techniques.softcap import SoftCap
from llm_quest.techniques.value_head import ValueHead
from tests.laws.subjects import TINY, own, random_tokens, shared

EXAMPLES: dict[str, Any] = {
    "lora": LoRA(rank=2),
    "rslora": RsLoRA(rank=2),
    "dora": DoRA(rank=2),
    "lora_xs": LoRAXS(rank=2),
    "tiny_lora": TinyLoRA(u=5, tying=0.5),
    "quantize": Quantize("int4"),
    "value_head": ValueHead(),
    "score_head": ScoreHead(3, labels=("a", "b", "c")),
    "hyper_connections": HyperConnections(streams=3),
    "multi_token": MultiTokenPrediction(),
    "length": ContextExtension(factor=4.0),
    "softcap": SoftCap(attention=2.0, final=3.0),
    "dyt": DyT(form="llama"),
    "checkpointing": ActivationCheckpointing(),
    "qk_clip": QKClip(),
    "taps": AttentionTaps(),
    "neftune": NEFTune(),
}
STRETCHED = "defined on the frequencies it was first trained with"
NORMED = "its queries are normalized after projection"
REFUSED: dict[tuple[str, str], str] = {
    **{
        ("qk_clip", page): NORMED
        for page in TINY
        if page.startswith(("qwen3", "gemma3", "olmo", "stablelm2", "exaone4"))
    },
    **{
        ("length", page): STRETCHED
        for page in (
            *("llama3.2-tiny", "gemma3-tiny", "deepseek-v2-tiny", "deepseek-v3-tiny", "phi3-tiny", "olmo3-tiny"),
            *("ministral-tiny", "gpt-oss-tiny"),
        )
    },
    ("length", "gpt2-tiny"): "positions are learned vectors, one for each",
    **{("multi_token", page): "has multi-token modules already" for page in ("deepseek-v3-tiny", "mimo-tiny")},
    ("softcap", "gemma2-tiny"): "capped at .* already",
}
"""(technique, preset) -> the reason, as the error says it."""

NOT_TRAINED = {"quantize"}
"""For inference alone: whole numbers have no gradient."""

LENGTH = 12
EXACT = {"rtol": 0.0, "atol": 1e-10}
CALLED = [name for name in EXAMPLES if callable(EXAMPLES[name])]
SHARE = 1 if "LLM_QUEST_ALL_PAIRS" in os.environ else 3
"""The suite judges every third pair: every law has every technique and every family. `python -m tests.laws.all_pairs`
judges all."""
PAIRS = [(name, page) for i, name in enumerate(CALLED) for j, page in enumerate(TINY) if (i + j) % SHARE == 0]
GRID = [pair for pair in PAIRS if pair not in REFUSED]
grid = pytest.mark.parametrize(("name", "page"), GRID)
saved_grid = pytest.mark.parametrize(("name", "page"), [pair for pair in GRID if pair[0] in TECHNIQUES])


@functools.cache
def model_after_technique(name: str, page: str) -> Decoder:
    """A model after the technique, with what it learns moved away from its first values."""
    model = EXAMPLES[name](own(page))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def logits_of(model: Decoder, tokens: Tensor, scope: Scope | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens, scope)


@functools.cache
def tokens_of(page: str) -> Tensor:
    return random_tokens(shared(page), 2, LENGTH)


@functools.cache
def logits_before(page: str) -> Tensor:
    """The page's logits."""
    return logits_of(shared(page), tokens_of(page))


@functools.cache
def logits_after(name: str, page: str) -> Tensor:
    """The edited model's."""
    return logits_of(model_after_technique(name, page), tokens_of(page))


def test_every_technique_has_an_example_here():
    assert set(EXAMPLES) == set(TECHNIQUES | TRAINING_TECHNIQUES)
    for name, example in EXAMPLES.items():
        assert type(example) is (TECHNIQUES | TRAINING_TECHNIQUES)[name]


def test_every_law_has_every_technique_and_every_family():
    assert {name for name, _ in GRID} == set(CALLED)
    for chosen in (GRID, [pair for pair in GRID if EXAMPLES[pair[0]].is_identity_at_init]):
        assert {page for _, page in chosen} == set(TINY)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name in TECHNIQUES])
def test_a_card_survives_json(name: str):
    listed = json.loads(json.dumps(techniques_to_json([EXAMPLES[name]], TECHNIQUES)))
    assert techniques_from_json(listed, TECHNIQUES) == [EXAMPLES[name]]
    assert {"name", *(field.name for field in fields(EXAMPLES[name]))} == set(listed[0])


@pytest.mark.parametrize(("name", "page"), [pair for pair in GRID if EXAMPLES[pair[0]].is_identity_at_init])
def test_a_neutral_technique_moves_no_logit_at_birth(name: str, page: str):
    torch.testing.assert_close(logits_of(EXAMPLES[name](own(page)), tokens_of(page)), logits_before(page), **EXACT)


@saved_grid
def test_what_is_saved_loads_with_the_same_logits_and_card(name: str, page: str, tmp_path: Path):
    model = model_after_technique(name, page)
    again = quest.load(quest.save(model, tmp_path / "model"))
    torch.testing.assert_close(logits_of(again, tokens_of(page)), logits_after(name, page), **EXACT)
    assert again.spec == model.spec
    learned = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned == {path for path, parameter in again.named_parameters() if parameter.requires_grad}


@grid
def test_a_second_application_is_refused_before_anything_changes(name: str, page: str):
    model = model_after_technique(name, page)
    card, modules = model.spec, [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match="already"):
        EXAMPLES[name](model)
    assert (model.spec, [id(module) for module in model.modules()]) == (card, modules)


@grid
def test_a_later_token_changes_no_earlier_logit(name: str, page: str):
    tokens = tokens_of(page)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % shared(page).config.vocab_size
    other = logits_of(model_after_technique(name, page), changed)
    torch.testing.assert_close(other[:, :7], logits_after(name, page)[:, :7], **EXACT)
    assert (other[:, 7] - logits_after(name, page)[:, 7]).abs().max() > 1e-3


@grid
def test_cached_equals_uncached(name: str, page: str):
    model, tokens = model_after_technique(name, page), tokens_of(page)
    cache, parts, start = model.new_cache(2, LENGTH), [], 0
    for length in (7, 1, 4):
        part = tokens[:, start : start + length]
        parts.append(logits_of(model, part, Scope.unpadded(part, cache=cache, start=start)))
        start += length
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_after(name, page), **EXACT)


@grid
def test_padding_is_invisible_and_packed_documents_equal_the_documents_alone(name: str, page: str):
    """By the law above, a document's logits are those of any row that begins with it."""
    model, tokens = model_after_technique(name, page), tokens_of(page)
    alone = torch.cat([logits_after(name, page)[:1, :5], logits_after(name, page)[1:, :7]], dim=1)
    gap = torch.full((1, 2), -1)
    positions = torch.cat([gap, torch.arange(5)[None], torch.arange(7)[None]], dim=1)
    segments = torch.cat([gap, torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 7, dtype=torch.int64)], dim=1)
    packed = torch.cat([gap.abs(), tokens[:1, :5], tokens[1:, :7]], dim=1)
    together = logits_of(model, packed, Scope(positions, segment_ids=segments))[:, 2:]
    torch.testing.assert_close(together, alone, **EXACT)
    padded = logits_of(model, packed[:, :7], Scope(positions[:, :7]))[:, 2:]
    torch.testing.assert_close(padded, alone[:, :5], **EXACT)


@grid
def test_every_trained_parameter_receives_a_gradient(name: str, page: str):
    model = model_after_technique(name, page)
    learned = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}
    if name in NOT_TRAINED:
        assert not learned
        return
    tokens = random_tokens(model, 3, 14)
    targets = tokens[:, 1:] % model.head.weight.shape[0]
    total = NextTokenLoss(model)(TokenBatch(tokens[:, :-1], targets)).total
    if name == "value_head":  # read by PPO's loss alone
        assert {path for path in learned if path.startswith("value_head.")} == {"value_head.weight", "value_head.bias"}
        learned = {path: parameter for path, parameter in learned.items() if not path.startswith("value_head.")}
    for path, gradient in zip(learned, torch.autograd.grad(total, list(learned.values())), strict=True):
        assert gradient.isfinite().all(), path
        assert gradient.abs().max() > 1e-9, path


@pytest.mark.parametrize(("name", "page"), list(REFUSED) or [pytest.param("", "", id="none refuses")])
def test_a_refusal_gives_its_reason(name: str, page: str):
    if name:
        with pytest.raises(ValueError, match=REFUSED[name, page]):
            EXAMPLES[name](own(page))
