"""Plans of recipes: counted on the run's own rows and images, and equal to what can be counted another way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quest.cli.train import estimate_cost
from llm_quest.cost.flops import ModelCost
from llm_quest.cost.plan import Plan
from llm_quest.errors import MissingError, UsageError
from llm_quest.hub.load_save import load
from llm_quest.recipes.engine import build_optimizer
from llm_quest.recipes.recipe import load_recipe
from tests.recipes.test_vision import SMALL_VIT, SMALL_VLM, two_classes
from tests.recipes.tuned import WORDS, base, planning_context, write_rows

POLICY = [
    "model.config={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1}",
    "model.config.intermediate_size=64", "task=reverse:shortest=3,longest=3,letters=4", "prompts_per_rollout=4",
    "num_generations=3", "max_new_tokens=5", "max_steps=10", "precision=fp32", "eval_problems=4",
]  # fmt: skip
PROMPT = 1 + len("reverse(abc)=")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan")
    rows = [
        {"prompt": f"say {a} {b}", "completion": a, "chosen": f"{a} {b}", "rejected": b, "text": a, "label": a[0] < "g"}
        for a in WORDS
        for b in WORDS
        if a != b
    ]
    given = [f"model.load={base(folder / 'model')}", f"data.source={write_rows(folder / 'rows.jsonl', rows)}"]
    return [*given, "precision=fp32", "max_steps=20", "warmup_steps=1", "batch_size=8", "sequence_length=40"]


def make_plan(recipe: str, *pairs: str, measure: bool = False) -> Plan:
    return estimate_cost(recipe, pairs, measure=measure, log=lambda text: None)


def build_job(recipe: str, pairs: list[str]) -> Any:
    found, config, _ = load_recipe(recipe, pairs)
    return found.build(config, planning_context())


# ---------------------------------------------------------------------------------------------- pretraining


def test_pretraining_is_planned_without_its_data_and_without_memory_for_its_model():
    found = make_plan(
        "tiny",
        "data.source=nothere.txt",
        "model={preset: mixtral-8x7b, config: {num_hidden_layers: 2, intermediate_size: 229376}}",
        "sequence_length=32",
        "batch_size=2",
        "optim=muon",
    )
    experts = 2 * 8 * 3 * 4096 * 229_376
    assert found.parameters == pytest.approx(experts, rel=0.01)
    assert found.memory["optimizer"] == pytest.approx(found.memory["weights"], rel=0.01), "experts are Muon's too"
    assert not found.fits
    assert "micro_batch_size below 2" in found.warnings[0]


def test_a_plan_of_pretraining_names_tokens():
    found = make_plan("tiny", "batch_size=4", "sequence_length=32", "max_steps=10", "micro_batch_size=2", measure=True)
    as_json = found.as_json()
    assert (as_json["tokens_per_step"], as_json["tokens"]) == (128, 1280)
    assert found.measured
    assert "10 steps of 128 tokens" in "\n".join(found.lines())
    adapted = make_plan("tiny", "batch_size=4", "sequence_length=32", "techniques=[lora]")
    assert adapted.trainable < found.trainable / 2


def test_the_recipes_threads_are_those_of_the_plan():
    before = torch.get_num_threads()
    try:
        make_plan("tiny", "batch_size=2", "sequence_length=32", f"threads={before + 1}")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------- fine-tuning


def test_fine_tunings_flops_are_three_passes_over_its_rows_padding_included(pairs: list[str]):
    found, job = make_plan("sft", *pairs), build_job("sft", pairs)
    some = [job.loader.batches(step) for step in range(8)]
    largest = max((batch for step in some for batch in step), key=lambda batch: batch.num_tokens)
    flops = 3 * ModelCost(job.model).forward(largest.input_ids.shape[1]) * largest.input_ids.shape[0]
    assert found.as_json()["flops_per_token"] * largest.num_tokens == pytest.approx(flops, rel=1e-3)
    assert found.units_per_step == sum(batch.num_tokens for step in some for batch in step) / 8
    assert found.memory["gradients"] == 4 * found.parameters == found.memory["weights"]
    assert found.first_flops == found.first_seconds == 0
    text = "\n".join(found.lines())
    assert "20 steps of 8 rows" in text
    assert "the reference" not in text


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "kto", "classify"])
def test_every_recipe_that_fine_tunes_is_planned_and_timed(pairs: list[str], recipe: str):
    found = make_plan(recipe, *pairs, measure=True)
    assert found.measured
    assert found.seconds == pytest.approx(20 * found.step_seconds + found.first_seconds)
    assert found.epochs is not None
    assert 0 < found.epochs < 20
    json.dumps(found.as_json())


def test_the_reference_is_paid_once_and_of_held_out_pairs_alone_where_a_model_follows(pairs: list[str]):
    cached, moving = make_plan("dpo", *pairs), make_plan("dpo", *pairs, "sync_ref_model=true", "ref_model_sync_steps=5")
    facts = build_job("dpo", pairs).facts
    a_pass = (moving.flops_per_step - cached.flops_per_step) / 8
    assert cached.first_flops == pytest.approx((facts["held_out_rows"] + facts["train_rows"]) * a_pass, rel=0.01)
    assert moving.first_flops == pytest.approx(facts["held_out_rows"] * a_pass, rel=0.01)
    assert moving.memory["reference"] == moving.memory["weights"]
    assert "reference" not in cached.memory
    assert "before: the reference" in "\n".join(cached.lines())


def test_a_teachers_weights_and_forward_pass_are_planned(pairs: list[str]):
    teacher = pairs[0].removeprefix("model.load=")
    alone, taught = make_plan("sft", *pairs), make_plan("sft", *pairs, f"teacher.load={teacher}")
    assert taught.memory["teacher"] == alone.memory["weights"] == taught.memory["weights"]
    assert 4 / 3 * alone.flops < taught.flops < 1.7 * alone.flops


def test_an_adapter_and_checkpointing_are_planned_as_they_are_trained(pairs: list[str]):
    plain, adapted, again = (
        make_plan("sft", *pairs, *more) for more in ((), ("techniques=[lora]",), ("gradient_checkpointing=true",))
    )
    assert adapted.trainable < plain.trainable / 2
    assert adapted.memory["gradients"] == 4 * adapted.trainable
    assert adapted.flops < plain.flops == again.flops
    assert again.step_seconds > plain.step_seconds
    assert again.memory["activations"] < plain.memory["activations"]
    for kind in ("weights", "gradients", "optimizer"):
        assert again.memory[kind] == plain.memory[kind]


def test_a_frozen_body_costs_no_gradient(pairs: list[str]):
    whole, head = make_plan("classify", *pairs), make_plan("classify", *pairs, "trainable=head")
    assert head.flops == pytest.approx(whole.flops / 3, rel=0.1)
    assert head.trainable == 2 * load(pairs[0].partition("=")[2]).config.hidden_size


# ---------------------------------------------------------------------------------------------- images


def test_a_vits_plan_by_hand(tmp_path: Path):
    pairs = [*SMALL_VIT, f"data.path={two_classes(tmp_path / 'images')}", "max_steps=10", "micro_batch_size=8"]
    found = make_plan("vit", *pairs)
    patches, width, hidden, tokens = 4, 16, 32, 5
    products = patches * 16 * width + 3 * width * width * tokens + width * width + 2 * width * hidden + width * 2
    pairs_of_tokens = 2 * tokens * width
    no_gradient_of_pixels = 2 * patches * 16 * width
    each = 6 * (products + pairs_of_tokens) - no_gradient_of_pixels
    assert found.as_json()["flops_per_image"] == each
    assert found.flops == each * 16 * 10
    assert "10 steps of 16 images" in "\n".join(found.lines())


def test_a_vlms_plan_holds_what_its_optimizer_holds():
    pairs = [*SMALL_VLM, "trainable=[projector,language_model]"]
    found, job = make_plan("vlm", *pairs, measure=True), build_job("vlm", pairs)
    optimizer = build_optimizer(job.config, job.model, job.adamw_parameters)
    job.objective(job.loader.batches(0)[0]).total.backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert found.memory["optimizer"] == sum(t.nbytes for t in tensors)
    assert found.trainable < found.parameters
    assert found.measured


def test_frozen_parts_of_a_vlm_are_planned_as_they_are_trained():
    whole, adapter, frozen = (
        make_plan("vlm", *SMALL_VLM, "batch_size=4", *more)
        for more in ((), ("techniques=[{name: lora, rank: 1}]",), ("trainable=[projector]",))
    )
    assert adapter.trainable < whole.trainable / 2
    assert adapter.memory["gradients"] == 4 * adapter.trainable
    assert frozen.flops < adapter.flops < whole.flops


def test_what_the_run_refuses_the_plan_refuses(tmp_path: Path):
    with pytest.raises(UsageError, match="technique hyper_connections: HyperConnections edits language models"):
        make_plan("vlm", *SMALL_VLM, "techniques=[hyper_connections]")
    with pytest.raises(MissingError, match=r"CIFAR-10 is not in .*Unpack cifar-10-binary\.tar\.gz"):
        make_plan("cifar10", f"data.path={tmp_path}")
    with pytest.raises(UsageError, match="longer than"):
        make_plan("tiny", "model={preset: gpt2-tiny}", "sequence_length=65")


# ---------------------------------------------------------------------------------------------- policies


def policy_model() -> Any:
    found, config, settings = load_recipe("grpo", POLICY)
    return found.build(config, replace(planning_context(), settings=settings)).model


def test_a_policys_memory_by_hand_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = make_plan("grpo", *POLICY, measure=True)
    assert found.memory["weights"] == 4 * found.parameters == found.memory["gradients"]
    keys_and_values = 2 * 2 * 16 * 4  # two layers, one head of 16
    assert found.memory["cache"] == 12 * keys_and_values * (PROMPT + 5 + 1), "and a spare slot"
    assert "reference" not in found.memory
    text = "\n".join(found.lines())
    assert "4 prompts x 3 samples a rollout" in text
    json.dumps(found.as_json())
    assert not list(tmp_path.iterdir())
    details = found.details
    assert found.step_seconds == pytest.approx(details["sampling"] + details["scoring"] + details["training"])
    assert 1 <= details["completion_length"] <= 5


def test_a_reference_costs_a_copy_and_a_pass_over_every_row():
    cost = ModelCost(policy_model())
    without, held = make_plan("grpo", *POLICY, measure=True), make_plan("grpo", *POLICY, "kl_coef=0.1", measure=True)
    a_pass = (held.flops - without.flops) / 10
    assert 12 * cost.forward(PROMPT) <= a_pass <= 12 * cost.forward(PROMPT + 4)
    sampling = without.flops / 10 - 3 * a_pass
    assert 4 * cost.forward(PROMPT) <= sampling <= 4 * cost.forward(PROMPT) + 12 * cost.decoding(PROMPT, 5)
    assert held.memory["reference"] == held.memory["weights"]


def test_a_rollout_that_serves_four_steps_is_sampled_once_for_them():
    once, four = (
        make_plan("grpo", *POLICY, *more, measure=True) for more in ((), ("num_iterations=2", "num_mini_batches=2"))
    )
    assert four.flops < 0.75 * once.flops


def test_recipes_that_are_not_planned_say_why():
    with pytest.raises(UsageError, match="leave --no-measure out"):
        make_plan("grpo", *POLICY)
    with pytest.raises(UsageError, match="several runs"):
        make_plan("iterative")
