"""Surrogates token by token, as on a blackboard (alignment.md 1.4, 1.9 to 1.11)."""

import math

import pytest
import torch
from torch import Tensor

from llm_quest.objectives.surrogates import (
    POLICY_VARIANTS,
    CISPOSurrogate,
    ClippedSurrogate,
    SAPOSurrogate,
    Surrogate,
    SurrogateInputs,
    UnclippedSurrogate,
    sequence_ratio,
    sequence_token_ratio,
)  # fmt: skip


def tokens(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def objective_and_slope(
    surrogate: Surrogate, log_ratios: Tensor, advantages: Tensor | float
) -> tuple[list[float], list[float]]:
    """Objective and derivative in log pi at each token of one sequence."""
    log_p = (log_ratios - 0.7).requires_grad_()
    learn = torch.ones_like(log_ratios, dtype=torch.bool)
    A = torch.as_tensor(advantages, dtype=torch.float64).expand_as(log_ratios)
    found, _ = surrogate(SurrogateInputs(log_p, log_p + 0.7, A, learn))
    (slope,) = torch.autograd.grad(found.sum(), log_p)
    return found[0].tolist(), slope[0].tolist()


def at_ratio(surrogate: Surrogate, rho: float, A: float) -> tuple[float, float]:
    found, slope = objective_and_slope(surrogate, tokens(math.log(rho)), A)
    return found[0], slope[0]


@pytest.mark.parametrize(
    ("rho", "A", "objective", "slope"),
    [
        (0.5, 1, 0.5, 0.5), (0.9, 1, 0.9, 0.9), (1.25, 1, 1.25, 1.25), (1.5, 1, 1.28, 0), (4.0, 1, 1.28, 0),
        (0.5, -1, -0.8, 0), (0.9, -1, -0.9, -0.9), (1.25, -1, -1.25, -1.25), (1.5, -1, -1.5, -1.5), (4.0, -1, -4, -4),
    ],
)  # fmt: skip
def test_clipping_takes_the_gradient_where_it_should_and_only_there(rho, A, objective, slope):
    assert at_ratio(ClippedSurrogate(0.2, 0.28), rho, A) == pytest.approx((objective, slope), abs=1e-9)
    if (rho, A) != (4.0, -1):
        assert at_ratio(ClippedSurrogate(0.2, 0.28, dual=3.0), rho, A) == pytest.approx((objective, slope), abs=1e-9)


def test_a_bad_token_that_became_likely_is_held_by_the_dual_clip_or_by_delta():
    assert at_ratio(ClippedSurrogate(0.2, 0.28, dual=3.0), 4.0, -1) == pytest.approx((-3, 0))
    assert at_ratio(ClippedSurrogate(0.2, 0.28, delta=3.5), 4.0, -1) == pytest.approx((-3.5, 0))
    assert at_ratio(ClippedSurrogate(0.2, 0.28, delta=3.5), 3.0, -1) == pytest.approx((-3, -3))


def test_where_the_ratio_was_held_is_reported():
    log_ratios = tokens(*map(math.log, (0.5, 1.0, 1.5)))
    terms = SurrogateInputs(log_ratios, log_ratios, tokens(1, 1, 1), torch.ones(1, 3, dtype=torch.bool))
    assert ClippedSurrogate(0.2, 0.28)(terms)[1].tolist() == [[False, False, True]]
    bad = terms._replace(advantages=tokens(-1, -1, -1))
    assert ClippedSurrogate(0.2, 0.28)(bad)[1].tolist() == [[True, False, False]]
    assert ClippedSurrogate(0.2, 0.28, dual=1.4)(bad)[1].tolist() == [[True, False, True]]
    assert ClippedSurrogate(0.2, 0.28, delta=1.4)(bad)[1].tolist() == [[True, False, True]]


@pytest.mark.parametrize("options", [{}, {"dual": 3.0}, {"dual": 1.1}, {"delta": 4.0}, {"delta": 1.1}])
@pytest.mark.parametrize("A", [-1.0, 1.0])
def test_a_ratio_is_held_exactly_where_the_gradient_is_gone(options: dict, A: float):
    surrogate, log_ratios = (
        ClippedSurrogate(0.2, 0.28, **options),
        tokens(*map(math.log, (0.5, 0.9, 1.05, 1.2, 1.5, 3.5, 5.0))),
    )
    slope = objective_and_slope(surrogate, log_ratios, A)[1]
    learn = torch.ones_like(log_ratios, dtype=torch.bool)
    held = surrogate(SurrogateInputs(log_ratios, log_ratios, torch.full_like(log_ratios, A), learn))[1]
    assert held[0].tolist() == [one == 0 for one in slope]


def test_the_sequence_ratio_is_a_geometric_mean():
    """s = exp(.05) = 1.051271, where the product would be 1.221403."""
    log_ratios = tokens(0.1, -0.2, 0.05, 0.25)
    gspo = ClippedSurrogate(3e-4, 4e-4, importance_ratio=sequence_ratio)
    found, slope = objective_and_slope(gspo, log_ratios, 1.0)
    assert found == pytest.approx([1.0004] * 4)
    assert slope == pytest.approx([0.0] * 4)
    found, slope = objective_and_slope(gspo, log_ratios, -1.0)
    assert found == pytest.approx([-1.051271] * 4, abs=1e-6)
    assert [each / 4 for each in slope] == pytest.approx([-0.262818] * 4, abs=1e-6)
    inside, _ = objective_and_slope(gspo, tokens(0.0003, -0.0001, 0.0002, 0.0), 1.0)
    assert inside == pytest.approx([1.000100] * 4, abs=1e-6)


def test_the_token_form_of_gspo_allows_an_advantage_per_token():
    wide = ClippedSurrogate(1.0, 1.0, importance_ratio=sequence_token_ratio)
    log_ratios = tokens(0.1, -0.2, 0.05, 0.25)
    found, slope = objective_and_slope(wide, log_ratios, tokens(1, 1, -1, -1))
    assert sum(found) / 4 == pytest.approx(0)
    assert [each / 4 for each in slope] == pytest.approx([0.262818, 0.262818, -0.262818, -0.262818], abs=1e-6)


@pytest.mark.parametrize("A", [0.7, -0.7])
def test_both_forms_of_gspo_agree_where_the_advantage_is_one_per_sequence(A):
    log_ratios = tokens(0.1, -0.2, 0.05, 0.051)
    one, other = (
        objective_and_slope(ClippedSurrogate(3e-2, 4e-2, importance_ratio=level), log_ratios, A)
        for level in (sequence_ratio, sequence_token_ratio)
    )
    assert one[0] == pytest.approx(other[0], abs=1e-12)
    assert one[1] == pytest.approx(other[1], abs=1e-12)


@pytest.mark.parametrize(
    ("rho", "up", "up_slope"),
    [
        (0.5, 1.510163, 0.940015), (0.8, 1.800664, 0.990066), (1.0, 2.0, 1.0),
        (1.2, 2.199336, 0.990066), (2.0, 2.924234, 0.786448), (4.0, 3.810297, 0.180707),
    ],
)  # fmt: skip
def test_sapo_fades_on_both_sides(rho, up, up_slope):
    value, slope = at_ratio(SAPOSurrogate(), rho, 1)
    assert (value, slope / rho) == pytest.approx((up, up_slope), abs=1e-6)


@pytest.mark.parametrize(
    ("rho", "down", "down_slope"),
    [(0.5, 1.415938, 0.934140), (1.0, 1.904762, 1), (2.0, 2.822000, 0.768110), (4.0, 3.652986, 0.157611)],
)
def test_sapo_fades_sooner_where_the_advantage_is_not_positive(rho, down, down_slope):
    value, slope = at_ratio(SAPOSurrogate(), rho, -1)
    assert (-value, -slope / rho) == pytest.approx((down, down_slope), abs=1e-6)


def test_cispo_caps_the_weight_and_never_the_gradient():
    log_ratios = tokens(*map(math.log, (0.3, 1, 1.25, 6)))
    assert objective_and_slope(CISPOSurrogate(5.0), log_ratios, 1.0)[1] == pytest.approx([0.3, 1, 1.25, 5])
    assert objective_and_slope(CISPOSurrogate(1.2, floor=0.8), log_ratios, 1.0)[1] == pytest.approx([0.8, 1, 1.2, 1.2])
    log_p = tokens(-0.7).requires_grad_()
    terms = SurrogateInputs(log_p, torch.full_like(log_p, math.log(6)), tokens(0.5), torch.ones(1, 1, dtype=torch.bool))
    loss = -CISPOSurrogate(5.0)(terms)[0].sum()
    (slope,) = torch.autograd.grad(loss, log_p)
    assert (loss.item(), slope.item()) == pytest.approx((1.75, -2.5))


@pytest.mark.parametrize("name", POLICY_VARIANTS)
@pytest.mark.parametrize("A", [0.8, -0.8])
def test_on_policy_every_surrogate_has_the_policy_gradient(name, A):
    """d objective / d log pi is A, whatever the variant: a run on fresh batches cannot tell them apart."""
    assert objective_and_slope(POLICY_VARIANTS[name].surrogate, tokens(0, 0, 0), A)[1] == pytest.approx([A] * 3)


def test_the_unclipped_surrogate_weighs_by_importance():
    assert at_ratio(UnclippedSurrogate(), 3.0, -0.5) == pytest.approx((-1.5, -1.5))
