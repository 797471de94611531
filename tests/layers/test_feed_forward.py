from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from llm_quest.layers.feed_forward import MLP, GatedMLP, gelu_tanh


def test_gelu_is_the_tanh_approximation():
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu_tanh(x), expected, rtol=0, atol=1e-12)
    assert (gelu_tanh(x) - F.gelu(x)).abs().max() > 1e-4, "the erf form must differ, or this proves nothing"


def test_an_mlp_by_hand():
    mlp = MLP(1, 2, torch.relu, bias=True)
    with torch.no_grad():
        mlp.up.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        mlp.up.bias.copy_(torch.tensor([0.0, 5.0]))
        mlp.down.weight.copy_(torch.tensor([[10.0, 1.0]]))
        mlp.down.bias.fill_(0.5)
    assert mlp(torch.tensor([[[3.0]]])).item() == 10 * 3 + 1 * 2 + 0.5


def test_a_gated_mlp_activates_the_gate_and_not_the_rest():
    mlp = GatedMLP(1, 1, F.silu)
    with torch.no_grad():
        mlp.gate_up.weight.copy_(torch.tensor([[2.0], [-3.0]]))
        mlp.down.weight.fill_(1.0)
    silu = 2 / (1 + math.exp(-2))
    assert mlp(torch.tensor([[[1.0]]])).item() == pytest.approx(silu * -3)


def test_the_gates_gradient_is_finite_far_below_zero():
    """x * 1/(1 + e^-x) written by hand has the gradient NaN below -88."""
    mlp = GatedMLP(1, 1, F.silu)
    with torch.no_grad():
        mlp.gate_up.weight.fill_(1.0)
    x = torch.tensor([[[-200.0]]], requires_grad=True)
    mlp(x).sum().backward()
    assert x.grad.isfinite().all()
