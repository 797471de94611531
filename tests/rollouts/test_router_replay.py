"""Router replay: recorded choices are taken again, with the weights of the present scores, and the ratio stays near
1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quest.data.policy_batch import row_from_json, row_to_json
from llm_quest.data.problems import parse_task
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import save
from llm_quest.layers.router_replay import find_routers, record_routing, replay_routing, stack_routing
from llm_quest.models.build import build, preset
from llm_quest.objectives.next_token import batch_hidden_states
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.rollouts.advantages import RewardPipeline, WeightedReward
from llm_quest.rollouts.rollouts import RolloutLoader, RolloutPlan
from llm_quest.rollouts.sampler import Sampler
from tests.objectives.rated import tiny
from tests.recipes.test_grpo import run_grpo
from tests.recipes.tuned import metrics
from tests.rollouts.test_rollouts import Words, ask, even_reward

FAMILIES = ["mixtral-tiny", "deepseek-v3-tiny", "qwen3-moe-tiny"]
TOKENS = torch.arange(1, 15).reshape(2, 7)


def routing_of_pass(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with record_routing(model) as chosen, torch.no_grad():
        model(tokens)
    return stack_routing(chosen, len(tokens))


def change_routers(model: Any) -> None:
    """So that other experts would be chosen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for router in find_routers(model):
            router.weight.add_(torch.randn(router.weight.shape, generator=generator, dtype=router.weight.dtype))


@pytest.mark.parametrize("page", FAMILIES)
def test_replaying_ones_own_choice_changes_no_bit_and_leaves_no_hook(page: str):
    model = tiny(page=page)
    before = model(TOKENS)
    with replay_routing(model, routing_of_pass(model)):
        assert torch.equal(model(TOKENS), before)
    assert torch.equal(model(TOKENS), before)
    assert not any(router._forward_hooks for router in find_routers(model))


@pytest.mark.parametrize("page", FAMILIES)
def test_another_models_choice_is_taken_with_the_present_weights(page: str):
    model = tiny(page=page)
    old = routing_of_pass(model)
    change_routers(model)
    assert not torch.equal(routing_of_pass(model), old)
    with replay_routing(model, old):
        assert torch.equal(routing_of_pass(model), old), (
            "what reaches the experts: a later hook sees what an earlier one gave"
        )
        total = model(TOKENS).square().sum()
    learned = [router.weight for router in find_routers(model)]
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(total, learned)), "routers still learn"
    assert not torch.equal(model(TOKENS).square().sum(), total)


def loader(policy: Any) -> RolloutLoader:
    def score(batch: Any) -> torch.Tensor:
        with record_routing(policy) as chosen:
            batch_hidden_states(policy, batch)
        return stack_routing(chosen, len(batch.input_ids))

    plan = RolloutPlan(prompts_per_rollout=4, num_generations=4, num_iterations=2, seed=3, share_prompts=False)
    sampler = Sampler(tokenizer=Words(), eos_token_ids=(7, 9), max_new_tokens=6)
    scoring = RewardPipeline(rewards=(WeightedReward("even", even_reward),))
    return RolloutLoader(policy, ask, sampler, scoring, plan, routing_scorer=score)


@pytest.mark.parametrize("page", FAMILIES)
def test_the_ratio_is_1_on_the_first_pass_and_the_recorded_experts_are_taken_on_the_second(page: str):
    """Ragged rows: each token, of the prompt too, keeps its own choice, whatever the padding."""
    policy = build(page, seed=1)
    feed = loader(policy)
    objective = PolicyGradientLoss(policy)
    for batch in feed.batches(0):
        objective(batch)
    assert objective.ratio_range.log().abs().max() < 1e-5
    alone = {row.prompt_ids + row.completion_ids: row.routing for row in feed.rollout.rows}
    for text, routing in alone.items():
        assert np.array_equal(routing_of_pass(policy, torch.tensor([text[:-1]]))[0].numpy(), routing)
    change_routers(policy)
    seen = list[torch.Tensor]()
    for batch in feed.batches(1):
        with record_routing(policy) as free:
            policy(batch.input_ids)
        with replay_routing(policy, batch.routing), record_routing(policy) as chosen:
            policy(batch.input_ids)
        assert torch.equal(stack_routing(chosen, len(batch.input_ids)), batch.routing)
        seen.append((stack_routing(free, len(batch.input_ids)) != batch.routing).any())
    assert any(seen), "without replay other experts are taken"


def test_the_objective_reads_the_recorded_routing():
    policy = build("mixtral-tiny", seed=1)
    feed = loader(policy)
    feed.batches(0)
    change_routers(policy)
    batch = feed.batches(1)[0]
    objective = PolicyGradientLoss(policy)
    replayed, free = (objective(one).total.item() for one in (batch, replace(batch, routing=None)))
    assert replayed != pytest.approx(free, rel=1e-6)


def test_rows_survive_a_checkpoint():
    row = loader(build("mixtral-tiny", seed=1)).generate_rollout(0).rows[0]
    again = row_from_json(row_to_json(row))
    assert np.array_equal(again.routing, row.routing)
    assert row.routing.shape[0] == row.length


def test_a_run_takes_it_and_a_model_without_experts_refuses_it(tmp_path: Path):
    tokenizer = character_tokenizer(parse_task("reverse").alphabet)
    for page in ("mixtral-tiny", "llama3.2-tiny"):
        config = replace(preset(page).config, vocab_size=tokenizer.vocab_size)
        save(build(config, seed=1), tmp_path / page, tokenizer=tokenizer)
    common = ["model=null", "warmup=null", "max_steps=2", "rewards=[{name: random}]", "router_replay=true"]
    with pytest.raises(UsageError, match="set num_iterations or num_mini_batches to 2"):
        run_grpo(tmp_path / "a", *common, f"model.load={tmp_path / 'mixtral-tiny'}", "num_iterations=1")
    common.append("num_iterations=2")
    run_grpo(tmp_path / "run", *common, f"model.load={tmp_path / 'mixtral-tiny'}")
    rows = metrics(tmp_path / "run")
    assert rows[0]["log_ratio"] < 1e-5 < rows[1]["log_ratio"]
    with pytest.raises(UsageError, match="this model has no experts"):
        run_grpo(tmp_path / "b", *common, f"model.load={tmp_path / 'llama3.2-tiny'}")
