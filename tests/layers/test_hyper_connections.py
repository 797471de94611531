"""Hyper-connections: mHC equals DeepSeek-V4's module; doubly stochastic; one stream is the plain residual."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from llm_quest.layers.hyper_connections import (
    STREAM_WEIGHTS,
    AverageStreams,
    ExpandStreams,
    HyperConnection,
    ManifoldWeights,
    PermutationMixture,
    SinkhornKnopp,
    WeightedStreamSum,
)
from llm_quest.layers.initialize import init_normal_, materialize
from tests.later import Later

theirs = Later("transformers.models.deepseek_v4.modeling_deepseek_v4")

WIDTH = 12


def randomize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def with_first_values(module: nn.Module) -> nn.Module:
    """With its first values, in float64."""
    materialize(module, "cpu", torch.float64)
    init_normal_(module, std=0.02, out_std=0.02, generator=torch.Generator().manual_seed(0))
    return module


def branch(y: Tensor) -> Tensor:
    return torch.sin(3 * y) + y.roll(1, -1)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_mhc_equals_deepseek_v4s_module_with_every_tensor_random(streams: int, generator: torch.Generator):
    config = SimpleNamespace(hc_mult=streams, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_size=WIDTH)
    oracle, head = theirs.DeepseekV4HyperConnection(config), theirs.DeepseekV4HyperHead(config)
    ours = HyperConnection(ManifoldWeights(WIDTH, streams, 0, SinkhornKnopp(eps=1e-6), eps=1e-6))
    leave = WeightedStreamSum(WIDTH, streams, eps=1e-6)
    randomize(ours, generator), randomize(leave, generator)
    with torch.no_grad():
        for mine, other in zip(
            (ours.weights.fn, ours.weights.base, leave.fn, leave.base, leave.scale),
            (oracle.fn, oracle.base, head.hc_fn, head.hc_base, head.hc_scale),
            strict=True,
        ):
            other.copy_(mine)
        oracle.scale.copy_(ours.weights.scale[[0, 1, 2]])
    x = torch.randn(2, 5, streams, WIDTH, generator=generator)
    post, comb, collapsed = oracle(x)
    y = branch(collapsed)
    expected = post[..., None] * y[:, :, None] + comb.transpose(-1, -2) @ x
    torch.testing.assert_close(ours(x, branch), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(leave(x), head(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mix", [SinkhornKnopp(), PermutationMixture()], ids=["sinkhorn", "birkhoff"])
def test_across_is_doubly_stochastic_and_so_is_a_product_of_many(mix, generator: torch.Generator):
    numbers = torch.randn(1, 7, len(mix.init_logits(4)), generator=generator, dtype=torch.float64)
    across = mix(numbers, 4)
    assert (across >= 0).all()
    for sums in (across.sum(-1), across.sum(-2)):
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-4, rtol=0)
    product = torch.linalg.multi_dot(list(across[0]))
    torch.testing.assert_close(product.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(product.sum(-2), torch.ones(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_sinkhorn_by_hand():
    """Two streams, [[3, 1], [1, 1]] after the softmax's rows: the fixed point keeps the cross ratio 3."""
    across = SinkhornKnopp(iterations=60)(torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64).log()[None, None], 2)[
        0, 0
    ]
    a = 3**0.5 / (1 + 3**0.5)
    torch.testing.assert_close(across, torch.tensor([[a, 1 - a], [1 - a, a]], dtype=torch.float64))


def test_birkhoff_by_hand():
    """Weight 3/4 on standing still, 1/4 on changing places."""
    across = PermutationMixture()(torch.tensor([3.0, 1.0]).log()[None, None], 2)[0, 0]
    torch.testing.assert_close(across, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))


@pytest.mark.parametrize(("form", "exact"), [("manifold", 1e-4), ("lite", 1e-12)])
def test_the_mean_of_the_streams_is_kept_where_the_layer_adds_nothing(form, exact, generator: torch.Generator):
    """Rows of `across` sum to 1: by 20 iterations nearly, by permutations exactly."""
    layer = randomize(HyperConnection(STREAM_WEIGHTS[form](WIDTH, 3, 1)), generator).double()
    layer.weights.fn.data.mul_(0.1)
    x = torch.randn(2, 5, 3, WIDTH, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(layer(x, torch.zeros_like).mean(2), x.mean(2), atol=exact, rtol=0)
    assert (layer(x, torch.zeros_like) - x).abs().max() > 0.1


@pytest.mark.parametrize("form", STREAM_WEIGHTS)
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_at_birth_it_is_the_plain_residual(form: str, streams: int, generator: torch.Generator):
    layers = [
        with_first_values(HyperConnection(STREAM_WEIGHTS[form](WIDTH, streams, index % streams))) for index in range(5)
    ]
    leave = AverageStreams() if form in ("static", "dynamic") else with_first_values(WeightedStreamSum(WIDTH, streams))
    x = torch.randn(2, 3, WIDTH, generator=generator, dtype=torch.float64)
    plain, wide = x, ExpandStreams(streams)(x)
    for layer in layers:
        plain, wide = plain + branch(plain), layer(wide, branch)
    torch.testing.assert_close(leave(wide), plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("form", ["dynamic", "manifold", "lite"])
def test_streams_part_ways_in_training(form: str, generator: torch.Generator):
    """Each layer reads another stream first, so the gradients of the weights out differ between streams."""
    layers = [with_first_values(HyperConnection(STREAM_WEIGHTS[form](WIDTH, 2, index % 2))) for index in range(3)]
    x = ExpandStreams(2)(torch.randn(2, 3, WIDTH, generator=generator, dtype=torch.float64))
    for layer in layers:
        x = layer(x, branch)
    x.square().sum().backward()
    moved = layers[0].weights.fixed.out.grad if form == "dynamic" else layers[0].weights.base.grad[2:4]
    assert (moved[0] - moved[1]).abs() > 1e-3
    assert layers[0].weights.fn.grad.abs().max() > 1e-6


def test_the_dynamic_weights_written_out(generator: torch.Generator):
    layer = randomize(HyperConnection(STREAM_WEIGHTS["dynamic"](WIDTH, 3, 0)), generator).double()
    x = torch.randn(1, 1, 3, WIDTH, generator=generator, dtype=torch.float64)
    w, h = layer.weights, x[0, 0]
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.norm.weight
    moved = torch.tanh(normed @ w.fn.T)
    inward = [w.fixed.inward[j] + w.scale[0] * moved[j, 0] for j in range(3)]
    y = branch(sum(inward[j] * h[j] for j in range(3)))
    for k in range(3):
        mixed = sum((w.fixed.across[3 * j + k] + w.scale[0] * moved[j, 1 + k]) * h[j] for j in range(3))
        expected = mixed + (w.fixed.out[k] + w.scale[1] * moved[k, 4]) * y
        torch.testing.assert_close(layer(x, branch)[0, 0, k], expected)


@pytest.mark.parametrize("form", STREAM_WEIGHTS)
def test_under_autocast_the_stream_stays_float32(form: str, generator: torch.Generator):
    layer = randomize(HyperConnection(STREAM_WEIGHTS[form](WIDTH, 2, 0)), generator)
    x = torch.randn(1, 4, 2, WIDTH, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, torch.zeros_like)
    assert y.dtype is torch.float32
    assert torch.equal(y, layer(x, torch.zeros_like))
    assert layer.to(torch.bfloat16)(x.bfloat16(), branch).dtype is torch.bfloat16
