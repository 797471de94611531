from __future__ import annotations

import pytest
import torch
from torch import nn

from llm_quest.layers.norm import AcrossHeads, LayerNorm, PerHeadLayerNorm, RMSNorm, ScaledNorm, ZeroCenteredRMSNorm


@pytest.mark.parametrize("norm", [RMSNorm(6, 1e-5), LayerNorm(6, 1e-5)], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_that_comes_in_goes_out_whatever_the_weights_are(norm: nn.Module, dtype: torch.dtype):
    assert norm(torch.randn(2, 3, 6).to(dtype)).dtype is dtype
    assert norm.to(dtype)(torch.randn(2, 3, 6).to(dtype)).dtype is dtype
    norm.to(torch.float32)


def test_rms_norm_by_hand():
    """x = (3, 4): mean square 12.5; eps 3.5 inside the root makes it 4."""
    norm = RMSNorm(2, 3.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 10.0]))
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([1.5, 10.0]))


def test_layer_norm_by_hand():
    """x = (1, 3): mean 2, biased variance 1; eps 3 inside the root makes it 2."""
    norm = LayerNorm(2, 3.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([4.0, 4.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(norm(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 2.0]))


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_eps_lies_inside_the_root_where_it_shows_on_small_inputs(eps: float, generator: torch.Generator):
    x = torch.randn(4, 32, generator=generator, dtype=torch.float64) * 1e-3
    expected = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(RMSNorm(32, eps).double()(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(RMSNorm(32, eps)(x.float()).double(), expected, rtol=0, atol=1e-6)
    centered = x - x.mean(-1, keepdim=True)
    expected = centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(LayerNorm(32, eps).double()(x), expected, rtol=0, atol=1e-12)


def test_in_bfloat16_the_cast_back_comes_before_the_weight(generator: torch.Generator):
    norm = RMSNorm(64, 1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.add_(torch.randn(64, generator=generator).bfloat16() * 0.3)
    x = torch.randn(32, 64, generator=generator).bfloat16()
    fine = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), fine.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (fine * norm.weight.float()).bfloat16()), (
        "the other order must differ, or this proves nothing"
    )


@pytest.mark.parametrize("norm", [RMSNorm(8, 1e-5), LayerNorm(8, 1e-5)], ids=["rms", "layer"])
def test_gradients_are_those_of_the_formula(norm: nn.Module, generator: torch.Generator):
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm.double(), (x,))
    norm.float()


def test_an_offset_norm_scales_by_one_plus_its_weight_in_float32_before_the_cast(generator: torch.Generator):
    norm = ZeroCenteredRMSNorm(64, 1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=generator).bfloat16() * 0.3)
    x = torch.randn(32, 64, generator=generator).bfloat16()
    fine = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), (fine * (1 + norm.weight.float())).bfloat16())


def test_a_norm_across_heads_by_hand():
    """Heads (3, 0) and (0, 4): the mean square of all four numbers is 6.25, the root 2.5."""
    norm = AcrossHeads(RMSNorm(4, 0.0))
    with torch.no_grad():
        norm.norm.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 10.0]))
    y = norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]])[None, None])
    torch.testing.assert_close(y[0, 0], torch.tensor([[1.2, 0.0], [0.0, 16.0]]))


def test_each_head_is_normalized_alone_with_its_own_weight():
    """Heads (1, 3) and (0, 4): means 2 and 2, deviations 1 and 2."""
    norm = PerHeadLayerNorm(2, 2, 0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 5.0, 7.0, 2.0]))
    y = norm(torch.tensor([[1.0, 3.0], [0.0, 4.0]])[None, None])
    torch.testing.assert_close(y[0, 0], torch.tensor([[-1.0, 5.0], [-7.0, 2.0]]))


def test_a_layer_norm_without_bias_still_subtracts_the_mean():
    norm = LayerNorm(2, 0.0, bias=False)
    assert dict(norm.named_parameters()).keys() == {"weight"}
    torch.testing.assert_close(norm(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))


def test_a_scaled_norm_is_the_norm_times_its_factor():
    x = torch.randn(3, 6)
    torch.testing.assert_close(ScaledNorm(RMSNorm(6, 1e-5), 0.25)(x), RMSNorm(6, 1e-5)(x) / 4)
