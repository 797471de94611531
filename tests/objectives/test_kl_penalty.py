"""KL estimators: their values by hand, and the gradient each has in expectation (alignment.md 1.5)."""

import math

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.objectives.kl_penalty import KL_ESTIMATORS, KLPenalty


def penalty_and_slope(name: str, log_p: float, reference: float, old: float) -> tuple[float, float]:
    x = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    found = KL_ESTIMATORS[name](x, torch.tensor(reference, dtype=torch.float64), x - old)
    return found.item(), torch.autograd.grad(found, x)[0].item()


@pytest.mark.parametrize(
    ("name", "log_p", "reference", "value", "slope"),
    [
        ("k1", -0.5, -1.0, 0.5, 1), ("k2", -0.5, -1.0, 0.125, 0.5), ("k3", -0.5, -1.0, 0.106531, 0.393469),
        ("k1", -1.0, -0.5, -0.5, 1), ("k2", -1.0, -0.5, 0.125, -0.5), ("k3", -1.0, -0.5, 0.148721, -0.648721),
        ("unbiased", -0.5, -1.0, 0.130117, 0.610701),
    ],
)  # fmt: skip
def test_values_and_slopes_by_hand(name, log_p, reference, value, slope):
    assert penalty_and_slope(name, log_p, reference, old=-0.7) == pytest.approx((value, slope), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("k1", 0.339617, [0.0, 0.0, 0.0]),
        ("k2", 0.363362, [0.363989, -0.233189, -0.130801]),
        ("k3", 0.339617, [0.391172, -0.207134, -0.184038]),
        ("unbiased", 0.339617, [0.363989, -0.233189, -0.130801]),
    ],
)
def test_the_expected_gradient_in_a_loss(name, value, gradient):
    """Over what the policy samples. grad KL(p || q) is that of k2 and of the unbiased form; k3 has p - q."""
    z = torch.tensor([1.0, 0, -1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.0, 0.5, 0], dtype=torch.float64).log_softmax(0)
    log_p = z.log_softmax(0)
    found = KL_ESTIMATORS[name](log_p, q, log_p - log_p.detach())
    expected = (log_p.detach().exp() * found).sum()
    torch.testing.assert_close(expected.item(), value, atol=1e-6, rtol=0)
    wanted = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(expected, z)[0], wanted, atol=1e-6, rtol=0)


def test_k1_in_the_reward_has_the_gradient_of_the_divergence():
    z = torch.tensor([1.0, 0, -1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.0, 0.5, 0], dtype=torch.float64).log_softmax(0)
    log_p = z.log_softmax(0)
    score_function = (log_p.detach().exp() * (log_p - q).detach() * log_p).sum()
    wanted = torch.tensor([0.363989, -0.233189, -0.130801], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(score_function, z)[0], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("beta", "estimator", "told"), [(0.1, "k1", "no effect"), (0.0, "k3", "no effect"), (0.1, "k4", "known")]
)
def test_a_term_without_effect_is_refused(beta, estimator, told):
    with pytest.raises(UsageError, match=told):
        KLPenalty(beta, estimator)


def test_a_far_reference_gives_a_finite_term():
    found = KLPenalty(1.0)(torch.tensor([-1.0]), torch.tensor([-1000.0]), torch.zeros(1))
    assert math.isfinite(found.item())
    assert math.isfinite(KLPenalty(1.0)(torch.tensor([-1000.0]), torch.tensor([-1.0]), torch.zeros(1)).item())
