"""Plans of fine-tuning: counted on the run's own rows, and equal to what can be counted another way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_quest.cli.train import plan_recipe
from llm_quest.cost.flops import ModelCost
from llm_quest.cost.plan_tuning import TuningPlan, sample_micro_batches
from llm_quest.cost.profile import profile_step
from llm_quest.hub.load_save import load
from llm_quest.recipes import dpo, sft
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.dpo import DpoConfig
from llm_quest.recipes.sft import SftConfig
from tests.recipes.tuned import WORDS, base, planning_context, written


def quiet(text: str) -> None:
    return None


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan")
    rows = [
        {"prompt": f"say {a} {b}", "completion": a, "chosen": f"{a} {b}", "rejected": b, "text": a, "label": a[0] < "g"}
        for a in WORDS
        for b in WORDS
        if a != b
    ]
    given = [f"model.load={base(folder / 'model')}", f"data.source={written(folder / 'rows.jsonl', rows)}"]
    return [*given, "precision=fp32", "max_steps=20", "warmup_steps=1", "batch_size=8", "sequence_length=40"]


def planned(recipe: str, pairs: list[str], *more: str, measure: bool = False) -> TuningPlan:
    found = plan_recipe(recipe, [*pairs, *more], measure=measure, log=quiet)
    assert isinstance(found, TuningPlan)
    return found


def test_fine_tunings_flops_are_three_passes_over_its_rows_padding_included(pairs: list[str]):
    found = planned("sft", pairs)
    config = parse_config(SftConfig, load_raw_config("sft", pairs))
    batch, tokens = sample_micro_batches(sft.build_sft(config, planning_context()), config.max_steps)
    model = load(config.model.load)
    products = 3 * ModelCost(model).forward(batch.input_ids.shape[1]) * batch.input_ids.shape[0]
    assert found.flops_per_token * batch.num_tokens == pytest.approx(products, rel=1e-3)
    assert found.tokens_per_step == tokens
    assert found.flops == pytest.approx(20 * found.flops_per_token * tokens)
    assert found.memory["gradients"] == 4 * found.parameters == found.memory["weights"]
    assert found.memory["optimizer"] == 8 * found.parameters
    assert (found.once_flops, found.once_seconds) == (0, 0)
    text = "\n".join(found.lines())
    assert "20 steps of 8 rows" in text
    assert "the reference" not in text
    json.dumps(found.as_json())


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "classify"])
def test_every_recipe_that_fine_tunes_is_planned_and_timed(pairs: list[str], recipe: str, tmp_path: Path):
    found = planned(recipe, pairs, measure=True)
    assert found.measured
    assert found.seconds == pytest.approx(20 * found.step_seconds + found.once_seconds)
    assert found.memory_total == sum(found.memory.values()) > 0
    assert 0 < found.epochs < 20
    assert not list(tmp_path.iterdir())


def test_the_reference_is_paid_once_and_of_held_out_pairs_alone_where_a_model_follows(pairs: list[str]):
    cached, moving = planned("dpo", pairs), planned("dpo", pairs, "sync_ref_model=true", "ref_model_sync_steps=5")
    a_pass_more = (moving.flops_per_token - cached.flops_per_token) * cached.tokens_per_step / 8
    assert cached.once_flops == pytest.approx(90 * a_pass_more)
    facts = dpo.build_dpo(parse_config(DpoConfig, load_raw_config("dpo", pairs)), planning_context()).facts
    assert moving.once_flops == pytest.approx(facts["held_out_rows"] * a_pass_more)
    assert moving.memory["reference"] == moving.memory["weights"]
    assert "reference" not in cached.memory
    assert "before: the reference" in "\n".join(cached.lines())


def test_a_teachers_weights_and_forward_pass_are_planned(pairs: list[str]):
    teacher = next(pair for pair in pairs if pair.startswith("model.load=")).removeprefix("model.load=")
    alone, taught = planned("sft", pairs), planned("sft", pairs, f"teacher.load={teacher}")
    assert taught.memory["teacher"] == alone.memory["weights"] == taught.memory["weights"]
    assert taught.flops_per_token == pytest.approx(4 / 3 * alone.flops_per_token, rel=0.2)
    assert taught.flops_per_token > 4 / 3 * alone.flops_per_token


def test_an_adapter_and_checkpointing_are_planned_as_they_are_trained(pairs: list[str]):
    plain, adapted, again = (
        planned("sft", pairs, *more) for more in ((), ("techniques=[lora]",), ("techniques=[checkpointing]",))
    )
    assert adapted.learned < plain.learned / 2
    assert adapted.memory["gradients"] == 4 * adapted.learned
    assert 0 < adapted.memory["optimizer"] <= 2 * adapted.memory["gradients"]
    assert adapted.flops_per_token < plain.flops_per_token < again.flops_per_token
    job = sft.build_sft(
        parse_config(SftConfig, load_raw_config("sft", [*pairs, "techniques=[checkpointing]"])), planning_context()
    )
    alone = profile_step(job.objective, sample_micro_batches(job, 20)[0], torch.device("cpu"), False).saved_bytes
    assert alone < again.memory["activations"] < plain.memory["activations"]
    assert {**again.memory, "activations": 0} == {**plain.memory, "activations": 0}


def test_a_frozen_body_costs_no_gradient(pairs: list[str]):
    whole, head = planned("classify", pairs), planned("classify", pairs, "trainable=head")
    assert head.flops_per_token == pytest.approx(whole.flops_per_token / 3, rel=0.1)
    assert head.learned == 2 * load(pairs[0].partition("=")[2]).config.hidden_size
