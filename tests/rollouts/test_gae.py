"""GAE: the worked example, the definition as a double sum, its ends, and rows of a rollout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quest.data.policy_batch import PolicyRow, row_from_json, row_to_json
from llm_quest.models.build import build
from llm_quest.objectives.next_token import batch_hidden_states
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.surrogates import POLICY_VARIANTS
from llm_quest.objectives.value_loss import ValueLoss
from llm_quest.rollouts.advantages import RewardPipeline, WeightedReward
from llm_quest.rollouts.gae import GAE, VALUE_ESTIMATORS, whiten_together
from llm_quest.rollouts.rollouts import RolloutLoader, RolloutPlan, ValueBaseline
from llm_quest.rollouts.sampler import Sampler
from llm_quest.techniques.value_head import ValueHead, remove_value_head, values_from_hidden
from tests.rollouts.test_rollouts import Words, ask, even_reward

REWARDS, VALUES = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.2, 0.4])


def row(reward: float, tokens: int = 3) -> PolicyRow:
    return PolicyRow((1, 2), tuple(range(tokens)), np.full(tokens, reward), np.full(tokens, -1.0, np.float32))


def by_definition(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l} (arXiv:1506.02438, eq. 16)."""
    behind = np.append(values[1:], 0.0)
    delta = rewards + gamma * behind - values
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, len(delta))) for t in range(len(delta))]


def test_the_worked_example():
    assert GAE(lam=0.5).advantages(REWARDS, VALUES).tolist() == pytest.approx([-0.05, 0.5, 0.6])
    found = GAE(lam=0.5, whiten=False).rows_with_values([row(1.0)], [VALUES], None)[0]
    assert found.returns.tolist() == pytest.approx([0.45, 0.7, 1.0])
    assert found.advantages.tolist() == pytest.approx([-0.05, 0.5, 0.6])
    assert found.values.tolist() == pytest.approx(VALUES.tolist())


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_it_is_the_sum_of_the_definition(gamma: float, lam: float):
    random = np.random.default_rng(0)
    rewards, values = random.normal(size=9), random.normal(size=9)
    found = GAE(gamma, lam).advantages(rewards, values)
    assert found.tolist() == pytest.approx(by_definition(rewards, values, gamma, lam))
    if lam == 1.0:
        assert (found + values).tolist() == pytest.approx(rewards[::-1].cumsum()[::-1].tolist()), "the rewards alone"


def test_penalties_are_of_each_token_and_the_value_learns_unwhitened_returns():
    """R 1 and -0.1, 0.2, 0.3 off: rewards 0.1, -0.2, 0.7; without discount the returns at lam 1 are their sums."""
    penalties = [np.array([-0.1, 0.2, 0.3])]
    found = GAE(lam=1.0).rows_with_values([row(1.0)], [VALUES], penalties)[0]
    assert found.returns.tolist() == pytest.approx([0.6, 0.5, 0.7])
    assert found.advantages.mean() == pytest.approx(0.0, abs=1e-6)
    assert found.advantages.std(ddof=1) == pytest.approx(1.0, abs=1e-6)


def test_whitening_is_over_all_rows_and_may_keep_the_mean():
    two = whiten_together([np.array([1.0, 2.0]), np.array([6.0])])
    flat = np.concatenate(two)
    assert (flat.mean(), flat.std(ddof=1)) == pytest.approx((0.0, 1.0))
    kept = np.concatenate(whiten_together([np.array([1.0, 2.0]), np.array([6.0])], shift_mean=False))
    assert kept.tolist() == pytest.approx((flat + 3.0).tolist())
    scaled = GAE(lam=1.0, whiten=False, whiten_rewards=True).rows_with_values([row(1.0), row(0.0)], [VALUES] * 2, None)
    rewards = np.array([0, 0, 1, 0, 0, 0])
    wanted = (rewards - 1 / 6) / rewards.std(ddof=1) + 1 / 6
    assert scaled[0].returns[2] == pytest.approx(wanted[2])


def test_rows_survive_a_checkpoint():
    found = GAE().rows_with_values([row(1.0)], [VALUES], None)[0]
    again = row_from_json(row_to_json(found))
    for name in ("advantages", "values", "returns"):
        assert getattr(again, name).tolist() == getattr(found, name).tolist()


def loader(policy, **options) -> RolloutLoader:
    plan = RolloutPlan(prompts_per_rollout=4, num_generations=options.pop("num_generations", 2), seed=3)
    sampler = Sampler(tokenizer=Words(), eos_token_ids=(7, 9), max_new_tokens=6)
    scoring = RewardPipeline(rewards=(WeightedReward("even", even_reward),), estimator=VALUE_ESTIMATORS["gae"])

    def scorer(batch):
        return values_from_hidden(policy, batch_hidden_states(policy, batch))

    return RolloutLoader(policy, ask, sampler, scoring, plan, value_baseline=ValueBaseline(scorer, GAE(**options)))


def policy_with_values(seed: int = 1):
    policy = ValueHead()(build("llama3.2-tiny", seed=seed))
    with torch.no_grad():
        policy.value_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return policy


@pytest.mark.parametrize("generations", [1, 2])
def test_a_rollouts_values_are_those_before_each_token_and_one_sample_a_prompt_is_enough(generations: int):
    """The value of a token does not depend on the token, and the last one's return is its reward."""
    policy = policy_with_values()
    batches = loader(policy, whiten=False, num_generations=generations).batches(0)
    groups = loader(policy, num_generations=generations).generate_rollout(0).groups
    rewards = {
        sample.prompt_ids + sample.completion_ids: even_reward([sample])[0] for group in groups for sample in group
    }
    assert sum(int(batch.loss_mask.any(dim=1).sum()) for batch in batches) == 4 * generations == len(rewards)
    for text, reward in rewards.items():
        with torch.no_grad():
            alone = values_from_hidden(policy, policy.hidden_states(torch.tensor([text[:-1]])))[0]
        found = [
            (batch.values[r][batch.loss_mask[r]], batch.returns[r][batch.loss_mask[r]])
            for batch in batches
            for r in range(len(batch.targets))
            if tuple(batch.targets[r][batch.loss_mask[r]].tolist()) == text[-int(batch.loss_mask[r].sum()) :]
        ]
        assert any(torch.allclose(values, alone[-len(values) :], atol=1e-4) for values, _ in found)
        assert any(returns[-1].item() == pytest.approx(reward, abs=1e-5) for _, returns in found)


def test_the_objective_adds_the_value_loss_and_both_heads_learn():
    policy = policy_with_values()
    surrogate = POLICY_VARIANTS["ppo"].surrogate
    batch = loader(policy).batches(0)[0]
    alone = PolicyGradientLoss(policy, surrogate, count="tokens")(batch)
    both = PolicyGradientLoss(policy, surrogate, count="tokens", value_loss=ValueLoss(0.5, 0.2))(batch)
    error = ((batch.values - batch.returns).square() * batch.loss_mask).sum()
    assert (both.total - alone.total).item() == pytest.approx(0.25 * error.item(), rel=1e-4)
    assert both.metrics["value/error"][0].item() == pytest.approx(error.item(), rel=1e-4)
    both.total.backward()
    assert policy.value_head.weight.grad.abs().max() > 1e-4
    assert policy.blocks[0].mixer.layer.out.weight.grad.abs().max() > 1e-6


def test_a_model_without_its_value_head_is_the_one_before():
    plain, policy = build("llama3.2-tiny", seed=1), policy_with_values()
    assert remove_value_head(policy).spec == plain.spec
    assert set(policy.state_dict()) == set(plain.state_dict())
