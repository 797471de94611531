"""A dry run refuses the techniques that the run refuses: the same edits of the same model, without its memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import llm_quest as quest
from llm_quest.cli.train import start_training
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load_model_and_tokenizer, save
from llm_quest.recipes.assembly import apply_techniques
from llm_quest.recipes.model_config import build_model_config
from llm_quest.recipes.recipe import load_recipe
from llm_quest.recipes.technique_check import ANY_VOCAB_SIZE, check_techniques
from llm_quest.recipes.technique_entry import known_techniques, parse_technique_entry
from llm_quest.techniques.quantize import Quantize
from llm_quest.train.optimizers import trainable_parameters
from tests.recipes.tuned import base

OPTIONS: dict[str, dict[str, Any]] = {"softcap": {"attention": 20.0}}
"""Of techniques that have no defaults."""
SAMPLE = ("quantize", "lora")
"""Each of them before and after every technique; every technique twice."""


def entry_of(name: str) -> dict[str, Any]:
    return parse_technique_entry({"name": name, **OPTIONS.get(name, {})})


def lists_of_two() -> list[tuple[str, str]]:
    names = list(known_techniques())
    found = [(name, name) for name in names]
    found += [pair for one in SAMPLE for name in names for pair in ((one, name), (name, one)) if one != name]
    return list(dict.fromkeys(found))


def refusal(call: Any) -> str:
    try:
        call()
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:softcap")
def test_two_techniques_are_refused_by_the_dry_run_as_by_the_run() -> None:
    """Every technique twice, and those of SAMPLE with every other, in both orders."""
    _, config, settings = load_recipe("pretrain", ["model.preset=llama3.2-tiny", "sequence_length=32"])
    numbers = build_model_config(config.model, settings, vocab=ANY_VOCAB_SIZE, context=32)
    fresh, refused = quest.build(numbers), set()

    def run(entries: Any) -> None:
        model = copy.deepcopy(fresh)
        apply_techniques(entries, model, lambda text: None)
        trainable_parameters(model)

    for names in lists_of_two():
        entries = tuple(map(entry_of, names))
        said = refusal(lambda entries=entries: run(entries))
        changed = config.model_copy(update={"techniques": entries})
        assert refusal(lambda changed=changed: check_techniques(changed, settings)) == said, names
        refused |= {names} if said else set()
    assert {("quantize", "quantize"), ("lora", "quantize"), ("lora", "lora"), ("lora", "dora")} <= refused
    assert ("quantize", "lora") not in refused
    assert {names for names in lists_of_two() if len(set(names)) == 1} - refused <= {("taps", "taps")}


def dry_run_refusal(recipe: str, *pairs: str) -> str:
    return refusal(lambda: start_training(recipe, pairs, out=None, dry_run=True, log=lambda text: None))


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "dpo", "grpo"])
def test_a_model_that_is_quantized_already_learns_through_an_adapter_alone(recipe: str, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(base(tmp_path / "base"))
    save(Quantize("int4")(model), tmp_path / "quantized", tokenizer=tokenizer)
    source = f"model.load={tmp_path / 'quantized'}"
    assert "applied to this model already" in dry_run_refusal(recipe, source, "techniques=[quantize]")
    assert "add lora to techniques" in dry_run_refusal(recipe, source)
    assert "add lora to techniques" in dry_run_refusal(
        recipe, f"model.load={tmp_path / 'base'}", "techniques=[quantize]"
    )
    assert dry_run_refusal(recipe, source, "techniques=[lora]") == ""
    assert "has an adapter" in dry_run_refusal(recipe, f"model.load={tmp_path / 'base'}", "techniques=[lora, quantize]")


@pytest.mark.parametrize("recipe", ["vit", "vlm"])
def test_a_technique_of_language_models_is_refused_for_images(recipe: str) -> None:
    assert "edits language models" in dry_run_refusal(recipe, "techniques=[quantize]")


def test_checkpointing_is_not_asked_for_in_two_ways() -> None:
    assert "checkpointing" in dry_run_refusal("tiny", "techniques=[checkpointing]", "gradient_checkpointing=true")


@pytest.mark.parametrize("recipe", ["classify", "reward", "prm"])
def test_a_score_head_that_comes_later_is_what_is_trained(recipe: str, tmp_path: Path) -> None:
    pairs = [f"model.load={base(tmp_path / 'base')}", "data.source=nowhere.jsonl"]
    assert dry_run_refusal(recipe, *pairs, "techniques=[quantize]") == ""
    assert "already" in dry_run_refusal(recipe, *pairs, "techniques=[quantize, quantize]")


def test_a_model_that_is_not_here_yet_is_left_to_the_run() -> None:
    assert dry_run_refusal("sft", "model.load=runs/of-a-later-command", "techniques=[quantize, quantize]") == ""
