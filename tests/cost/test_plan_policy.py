"""Plans of GRPO: a few real steps with a coin's rewards, and bills that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_quest.cli.train import plan_recipe
from llm_quest.cost.flops import ModelCost
from llm_quest.cost.plan_policy import PolicyPlan, init_plan_policy
from llm_quest.errors import UsageError
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.grpo import GrpoConfig

SMALL = [
    "model.config={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 64}",
    "task=reverse:shortest=3,longest=3,letters=4",
    "prompts_per_rollout=4", "num_generations=3", "max_new_tokens=5",
    "max_steps=10", "precision=fp32", "eval_problems=4",
]  # fmt: skip
PROMPT = 1 + len("reverse(abc)=")


def quiet(text: str) -> None:
    return None


def planned(*more: str) -> PolicyPlan:
    found = plan_recipe("grpo", [*SMALL, *more], measure=True, log=quiet)
    assert isinstance(found, PolicyPlan)
    return found


def test_memory_by_hand_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = planned()
    assert found.memory["weights"] == 4 * found.parameters == found.memory["gradients"]
    assert found.memory["optimizer"] == 8 * found.parameters
    keys_and_values = 2 * 2 * 16 * 4  # two layers, one head of 16
    assert found.memory["cache"] == 12 * keys_and_values * (PROMPT + 5 + 1), "and a spare slot"
    assert found.memory_total == sum(found.memory.values())
    assert "reference" not in found.memory
    text = "\n".join(found.lines())
    assert "a rollout is 4 prompts x 3 samples" in text
    assert "without a warm-up" in text
    json.dumps(found.as_json())
    assert not list(tmp_path.iterdir())


def test_time_is_told_by_what_is_done_in_a_step():
    found = planned()
    assert min(found.sampling, found.training) > 0
    assert found.step_seconds == pytest.approx(found.sampling + found.scoring + found.training)
    assert found.seconds == pytest.approx(10 * found.step_seconds)
    assert 1 <= found.length <= 5


def test_a_reference_costs_a_copy_and_a_pass_over_every_row():
    settings = load_raw_config("grpo", SMALL)
    cost = ModelCost(init_plan_policy(parse_config(GrpoConfig, settings), settings)[0])
    without, held_to = planned(), planned("kl_coef=0.1")
    a_pass = (held_to.flops - without.flops) / 10
    assert 12 * cost.forward(PROMPT) <= a_pass <= 12 * cost.forward(PROMPT + 4)
    sampling = without.flops / 10 - 3 * a_pass
    assert 4 * cost.forward(PROMPT) <= sampling <= 4 * cost.forward(PROMPT) + 12 * cost.decoding(PROMPT, 5)
    assert held_to.memory["reference"] == held_to.memory["weights"]
    adapted = planned("kl_coef=0.1", "techniques=[lora]")
    assert "reference" not in adapted.memory, "the same memory, with the adapters off"
    assert adapted.learned < adapted.parameters / 2


def test_a_rollout_that_serves_four_steps_is_sampled_once_for_them():
    once, four = planned(), planned("num_iterations=2", "num_mini_batches=2", "loss_kwargs.epsilon_low=0.2")
    assert four.flops < 0.75 * once.flops


def test_a_step_of_a_policy_is_not_predicted():
    with pytest.raises(UsageError, match="measured and not predicted: leave --no-measure out"):
        plan_recipe("grpo", SMALL, measure=False, log=quiet)
    with pytest.raises(UsageError, match="runs of rpt are not planned; try rpt with steps=20"):
        plan_recipe("rpt", [], measure=True, log=quiet)
