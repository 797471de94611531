"""Log-probabilities of given tokens: both forms are the definition, shifted right, tempered, in float32."""

import math

import pytest
import torch

from llm_quest.data.batch import TokenBatch
from llm_quest.models.build import build
from llm_quest.objectives import log_probs
from llm_quest.objectives.log_probs import chunked_log_probs, full_log_probs, token_log_probs


def example(dtype=torch.float64, rows=600):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 12, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(41, 12, generator=generator, dtype=dtype, requires_grad=True)
    return x, weight, torch.randint(0, 41, (rows,), generator=generator), torch.randn(rows, generator=generator)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_equals_the_definition_in_value_and_in_the_gradient_of_any_weighting(cap, temperature):
    x, weight, targets, weighting = example()
    values, gradients = [], []
    for form in (full_log_probs, chunked_log_probs):
        found = form(x, weight, targets, cap, temperature)
        values.append(found.detach())
        gradients.append(torch.autograd.grad((found * weighting).sum(), (x, weight)))
    torch.testing.assert_close(values[0], values[1], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-10, rtol=1e-10)


def test_the_gradient_is_that_of_finite_differences():
    x, weight, targets, _ = example(rows=3)
    assert torch.autograd.gradcheck(lambda x, w: chunked_log_probs(x, w, targets, 2.0, 0.7), (x, weight))


@pytest.mark.parametrize("at_once", [log_probs.MAX_FULL_LOGITS_BYTES, 0])
def test_each_target_is_scored_where_it_is_predicted(at_once, monkeypatch):
    """Against a loop over positions, one prefix at a time (P5)."""
    monkeypatch.setattr(log_probs, "MAX_FULL_LOGITS_BYTES", at_once)
    model = build("llama3.2-tiny", seed=1)
    tokens = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    targets = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
    targets[0, :3] = -100
    got = token_log_probs(model, TokenBatch(tokens, targets), 1.3).detach()
    for row in range(2):
        for t in range(7):
            if targets[row, t] == -100:
                assert got[row, t] == 0
                continue
            logits = model(tokens[row : row + 1, : t + 1])[0, -1].detach().double() / 1.3
            assert got[row, t].item() == pytest.approx(logits.log_softmax(0)[targets[row, t]].item(), abs=1e-5)


def test_temperature_divides_the_logits():
    """The worked example of P2: at 0.6 the likeliest of these six has log-probability -0.511121, at 1 -0.778337."""
    x, weight = torch.tensor([[1.0]]), torch.tensor([[2.0], [1.5], [1.0], [0.0], [-1.0], [-2.0]])
    first = torch.tensor([0])
    assert full_log_probs(x, weight, first, None, 0.6).item() == pytest.approx(-0.511121, abs=1e-6)
    assert full_log_probs(x, weight, first, None, 1.0).item() == pytest.approx(-0.778337, abs=1e-6)
    assert math.exp(-0.778337 + 0.511121) == pytest.approx(0.765507, abs=1e-6)


def test_bfloat16_logits_of_magnitude_30_lose_nothing_after_the_product():
    weight = (torch.linspace(-30, 30, 41)[:, None]).bfloat16()
    x, target = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([37])
    exact = weight.double().T.log_softmax(1)[0, 37].item()
    for form in (full_log_probs, chunked_log_probs):
        found = form(x, weight, target, None, 1.0)
        assert found.dtype == torch.float32
        assert abs(found.item() - exact) < 1e-3


def test_a_row_without_targets_has_no_gradient_and_no_nan():
    model = build("llama3.2-tiny", seed=1)
    tokens = torch.ones(1, 3, dtype=torch.long)
    found = token_log_probs(model, TokenBatch(tokens, torch.full_like(tokens, -100)))
    found.sum().backward()
    assert found.abs().max() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
