"""Reinforced attention learning's divergence: the published vector, no force at the old policy, sums that add up."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from llm_quest.data.policy_batch import PolicyBatch
from llm_quest.errors import UsageError
from llm_quest.models.build import build
from llm_quest.objectives.attention_divergence import (
    AttentionDivergenceLoss,
    AttentionPolicyBatch,
    attention_policy,
    compute_attention_policy,
    jensen_shannon,
)
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.techniques.attention_taps import AttentionTaps


def test_the_token_itself_is_left_out_and_the_rest_sums_to_1():
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, 3] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    weights[0, 0, 0, 0] = 1.0
    torch.testing.assert_close(attention_policy(weights)[0, 3], torch.tensor([1 / 6, 1 / 3, 1 / 2, 0.0]))
    assert attention_policy(weights)[0, 0].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_vector_ral_1():
    z = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    value = jensen_shannon(z.softmax(-1), q)
    value.backward()
    assert value.item() == pytest.approx(0.066414, abs=1e-6)
    torch.testing.assert_close(
        z.grad, torch.tensor([0.072565, -0.009962, -0.062603], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_its_bounds_and_no_nan_where_a_key_is_hidden():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor([math.log(2), 0.0], dtype=torch.float64))
    scores = torch.tensor([0.3, -0.2, float("-inf")], dtype=torch.float64).requires_grad_()
    jensen_shannon(scores.softmax(-1), torch.tensor([0.2, 0.8, 0.0], dtype=torch.float64)).backward()
    assert scores.grad.isfinite().all()


def case(rows: int = 3):
    model = AttentionTaps()(build("llama3.2-tiny").double()).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(97, (rows, 8), generator=generator)
    targets = tokens.roll(-1, 1).clone()
    targets[:, :3] = -100
    advantages = torch.randn(rows, 1, generator=generator).expand(-1, 8).contiguous()
    batch = PolicyBatch(tokens, targets, advantages, torch.zeros(rows, 8), num_tokens=8 * rows)
    return model, AttentionPolicyBatch(batch, compute_attention_policy(model, tokens).detach())


def copy_and_perturb(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return other


def test_at_the_old_policy_there_is_neither_value_nor_gradient():
    model, batch = case()
    loss = AttentionDivergenceLoss(model)(batch)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert loss.count == 15
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in model.parameters())


def test_halves_add_up_and_the_advantage_decides_the_direction():
    model, batch = case()
    objective = AttentionDivergenceLoss(copy_and_perturb(model))
    loss = objective(batch)
    total, count = loss.metrics["divergence"]
    assert 0 < total / count < math.log(2)
    parts = [
        objective(AttentionPolicyBatch(part(batch.rows, s), batch.old_attention[s])) for s in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0].total + parts[1].total, loss.total)
    assert parts[0].count + parts[1].count == loss.count
    kept = replace(batch.rows, advantages=torch.ones(3, 8))
    torch.testing.assert_close(objective(AttentionPolicyBatch(kept, batch.old_attention)).total, total)
    left = replace(batch.rows, advantages=-torch.ones(3, 8))
    torch.testing.assert_close(objective(AttentionPolicyBatch(left, batch.old_attention)).total, -total)


def part(rows: PolicyBatch, some: slice) -> PolicyBatch:
    return PolicyBatch(rows.input_ids[some], rows.targets[some], rows.advantages[some], rows.sampler_log_probs[some])


def test_a_step_along_it_brings_the_attention_back():
    model, batch = case()
    objective = AttentionDivergenceLoss(copy_and_perturb(model))
    batch = AttentionPolicyBatch(replace(batch.rows, advantages=torch.ones(3, 8)), batch.old_attention)
    before = objective(batch)
    before.total.backward()
    with torch.no_grad():
        for parameter in objective.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / (parameter.grad.norm() + 1e-12)
    assert objective(batch).total < before.total


@pytest.mark.parametrize("count", ["tokens", "sequences"])
def test_in_a_policy_gradient_it_is_added_times_lambda_and_weighed_as_the_tokens_are(count: str):
    model, given = case()
    policy, batch = copy_and_perturb(model), replace(given.rows, attention_maps=given.old_attention)
    plain = PolicyGradientLoss(policy, count=count)(batch)
    loss = PolicyGradientLoss(policy, count=count, attention_coef=0.5)(batch)
    each = (
        jensen_shannon(compute_attention_policy(policy, batch.input_ids), given.old_attention)
        * batch.advantages
        * batch.loss_mask
    )
    own = each.sum() if count == "tokens" else (each.sum(dim=1) / batch.loss_mask.sum(dim=1)).sum()
    torch.testing.assert_close(loss.total, plain.total + 0.5 * own)
    torch.testing.assert_close(loss.count, plain.count)
    assert loss.metrics["attention_divergence"][0] > 0
    assert torch.equal(PolicyGradientLoss(policy, count=count, attention_coef=0.0)(batch).total, plain.total)


def test_vector_ral_1_in_a_policy_gradient():
    """One learned token whose advantage is 2: the surrogate gives -2 (ratio 1), attention 0.5 x 2 x 0.066414."""
    targets = torch.tensor([[-100, -100, 5]])
    now, old = torch.zeros(2, 1, 3, 3)
    now[0, 2], old[0, 2] = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    sampled = torch.full((1, 3), -0.7)
    batch = PolicyBatch(
        torch.zeros(1, 3, dtype=torch.int64), targets, torch.full((1, 3), 2.0), sampled, attention_maps=old
    )
    loss = PolicyGradientLoss(build("llama3.2-tiny"), count="tokens", attention_coef=0.5).loss(
        sampled, batch, attention=now
    )
    assert loss.total.item() == pytest.approx(-2.0 + 0.066414, abs=1e-6)


def test_a_model_without_a_tap_is_told_so():
    _, batch = case()
    with pytest.raises(UsageError, match=r"0 attention taps; this needs one.*Taps\(\(-1,\)\)"):
        AttentionDivergenceLoss(build("llama3.2-tiny"))(batch)
