"""Gated DeltaNet: the chunked form is the recurrent one; padding and packing do not leak into the state."""

import pytest
import torch

from llm_quest.layers.delta_net import FlatProjection, GatedDeltaNet, InterleavedProjection
from llm_quest.layers.delta_rule import chunk_gated_delta_rule, l2norm, recurrent_gated_delta_rule
from llm_quest.scope import Scope


def example(length=150, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random_normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k = l2norm(random_normal(2, length, 3, 8)), l2norm(random_normal(2, length, 3, 8))
    g = -torch.rand(2, length, 3, generator=generator, dtype=dtype) * 2
    beta = torch.rand(2, length, 3, generator=generator, dtype=dtype)
    return q, k, random_normal(2, length, 3, 12), g, beta, random_normal(2, 3, 8, 12)


def documents(length=150):
    first = torch.repeat_interleave(torch.arange(4), torch.tensor([40, 24, 30, 56]))
    second = torch.repeat_interleave(torch.arange(2), torch.tensor([100, 50]))
    return torch.stack((first, second))[:, :length]


@pytest.mark.parametrize("size", [1, 16, 64, 150])
@pytest.mark.parametrize("segments", [None, documents()])
def test_chunks_of_any_size_are_the_recurrence(size, segments):
    inputs = example()
    expected, state = recurrent_gated_delta_rule(*inputs, segments)
    got, got_state = chunk_gated_delta_rule(*inputs, segments, size)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(got_state, state, atol=1e-12, rtol=1e-10)


def test_the_recurrence_worked_by_hand():
    """One head, width 1: S = 2; fade by 1/2; key 1, value 5, beta 1/2: error 4, S = 1 + 2 = 3; query 10 reads 30."""
    one = torch.ones(1, 1, 1, 1)
    g, beta = torch.full((1, 1, 1), 0.5).log(), torch.full((1, 1, 1), 0.5)
    o, state = recurrent_gated_delta_rule(one * 10, one, one * 5, g, beta, torch.full((1, 1, 1, 1), 2.0))
    assert o.item() == pytest.approx(30.0)
    assert state.item() == pytest.approx(3.0)


def test_orthonormal_keys_without_fading_recall_their_values_exactly():
    keys = torch.eye(8, dtype=torch.float64)[None, :, None]
    values = torch.randn(1, 8, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(1, 8, 1, dtype=torch.float64)
    _, state = chunk_gated_delta_rule(keys, keys, values, zero, zero + 1, torch.zeros(1, 1, 8, 5, dtype=torch.float64))
    torch.testing.assert_close(state[0, 0], values[0, :, 0])


def test_gradients_of_both_forms_agree_and_stay_finite_under_strong_fading():
    q, k, v, g, beta, state = example(70)
    g = g * 40
    results = []
    for rule in (recurrent_gated_delta_rule, chunk_gated_delta_rule):
        inputs = [part.clone().requires_grad_() for part in (q, k, v, g, beta, state)]
        o, last = rule(*inputs)
        results.append(torch.autograd.grad(o.square().sum() + last.sum(), inputs))
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_both_forms_are_transformers_own():
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, g, beta, state = example(dtype=torch.float32)
    expected, _ = theirs.torch_recurrent_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=False
    )
    for rule in (recurrent_gated_delta_rule, chunk_gated_delta_rule):
        torch.testing.assert_close(rule(q * 8**-0.5, k, v, g, beta, state)[0], expected, atol=3e-6, rtol=1e-4)


def layer(inputs=FlatProjection) -> GatedDeltaNet:
    made = GatedDeltaNet(
        16, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=12, conv_kernel_size=4, eps=1e-6, inputs=inputs
    ).double()
    made.init_weights(torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("inputs", [FlatProjection, InterleavedProjection])
@torch.no_grad()
def test_padding_anywhere_neither_fades_nor_writes(inputs):
    mixer, generator = layer(inputs), torch.Generator().manual_seed(2)
    x = torch.randn(2, 70, 16, generator=generator, dtype=torch.float64)
    padded = torch.randn(2, 100, 16, generator=generator, dtype=torch.float64) * 5
    positions = torch.full((2, 100), -1)
    for row in range(2):
        places = torch.randperm(100, generator=generator)[:70].sort().values
        positions[row, places], padded[row, places] = torch.arange(70), x[row]
    got = mixer(padded, Scope(positions))
    for row in range(2):
        torch.testing.assert_close(
            got[row][positions[row] >= 0], mixer(x, Scope.unpadded(x[..., 0]))[row], atol=1e-12, rtol=1e-9
        )


@torch.no_grad()
def test_neither_state_nor_convolution_crosses_documents():
    mixer = layer()
    x = torch.randn(1, 70, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    positions = torch.cat((torch.arange(33), torch.arange(37)))[None]
    segments = torch.cat((torch.zeros(33), torch.ones(37)))[None].long()
    got = mixer(x, Scope(positions, segment_ids=segments))
    alone = [mixer(part, Scope.unpadded(part[..., 0])) for part in (x[:, :33], x[:, 33:])]
    torch.testing.assert_close(got, torch.cat(alone, 1), atol=1e-12, rtol=1e-9)


def test_uneven_heads_and_rescaling_are_refused():
    with pytest.raises(ValueError, match="evenly"):
        GatedDeltaNet(
            8,
            num_k_heads=2,
            num_v_heads=3,
            head_k_dim=4,
            head_v_dim=4,
            conv_kernel_size=4,
            eps=1e-6,
            inputs=FlatProjection,
        )
    with pytest.raises(ValueError, match="no attention logits"):
        layer().rescale_logits_(torch.ones(4))
