"""PPO's clipped value loss, by hand."""

from __future__ import annotations

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.objectives.value_loss import ValueLoss


def loss_and_slope(v: float, old: float, target: float, clip: float | None = 0.2) -> tuple[float, float]:
    """The loss of one token, and its slope in v."""
    value = torch.tensor([[v]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[[old]], [[target]]], dtype=torch.float64)
    each, _ = ValueLoss(1.0, clip)(value, other[0], other[1])
    return each.item(), torch.autograd.grad(each.sum(), value)[0].item()


@pytest.mark.parametrize(
    ("v", "old", "target", "loss", "slope"),
    [
        (0.6, 0.5, 1.0, 0.08, -0.4),  # inside the range
        (0.9, 0.5, 1.0, 0.045, 0.0),  # it moved 0.4 towards the return: clipped at 0.7, no gradient
        (0.1, 0.5, 1.0, 0.405, -0.9),  # it moved away: the plain error, with its gradient
        (1.4, 0.5, 0.6, 0.32, 0.8),  # beyond the return: pulled back
    ],
)
def test_worked_values_and_slopes(v, old, target, loss, slope):
    found = loss_and_slope(v, old, target)
    assert found == (pytest.approx(loss), pytest.approx(slope))


def test_without_a_clip_it_is_half_the_squared_error():
    assert loss_and_slope(0.9, 0.5, 1.0, None) == (pytest.approx(0.005), pytest.approx(-0.1))


@pytest.mark.parametrize("options", [{"coef": 0.0}, {"clip": 0.0}])
def test_numbers_at_or_below_0_are_refused(options):
    with pytest.raises(UsageError, match="give numbers above 0"):
        ValueLoss(**options)
