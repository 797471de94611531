"""Taps: the recorded weights are those that were used, no logit moves, and gradients flow through them."""

from __future__ import annotations

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.models.build import build
from llm_quest.scope import Scope
from llm_quest.techniques.attention_taps import AttentionTaps
from tests.laws.subjects import own, random_tokens


def record_attention(model, tokens, **more):
    records: dict = {}
    model(tokens, Scope.unpadded(tokens, records=records, **more))
    return records.get("attention", [])


@pytest.mark.parametrize("page", ["gpt2-tiny", "llama3.2-tiny", "gemma2-tiny", "mimo-tiny", "deepseek-v3-tiny"])
def test_the_weights_are_those_that_mixed_the_values(page: str):
    """Their product with the values, through the output matrix, is what the layer said: caps and sinks included."""
    model = AttentionTaps((1,))(own(page))
    tokens = random_tokens(model, 2, 9)
    seen = []
    mixer = model.blocks[1].mixer.layer
    mixer.attend.register_forward_hook(lambda attend, inputs, output: seen.append((inputs[2], output)))
    [(layer, weights)] = record_attention(model, tokens)
    assert layer == 1
    values, out = seen[0]
    spread = values.repeat_interleave(weights.shape[1] // values.shape[2], dim=2)
    torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", weights, spread), out)
    assert weights.triu(1).abs().max() == 0
    sums = weights.sum(-1)
    assert (sums <= 1 + 1e-12).all()
    if mixer.attend.sink is None:
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_nothing_is_recorded_unless_somebody_asks_and_no_logit_moves():
    model = AttentionTaps((0, -1))(own("llama3.2-tiny"))
    tokens = random_tokens(model, 2, 9)
    assert torch.equal(model(tokens), own("llama3.2-tiny")(tokens))
    records: dict = {}
    assert torch.equal(model(tokens, Scope.unpadded(tokens, records=records)), model(tokens))
    assert [tapped.layer for tapped in records["attention"]] == [0, 1]


def test_with_a_cache_the_queries_see_all_keys_and_gradients_flow():
    model = AttentionTaps()(own("qwen3-next-tiny"))
    tokens = random_tokens(model, 1, 8)
    [(_, whole)] = record_attention(model, tokens)
    cache = model.new_cache(1, 8)
    record_attention(model, tokens[:, :5], cache=cache)
    [(_, rest)] = record_attention(model, tokens[:, 5:], cache=cache, start=5)
    torch.testing.assert_close(rest[..., -8:], whole[:, :, 5:])
    whole.square().sum().backward()
    mixer = next(m for m in model.modules() if isinstance(m, GroupedQueryAttention))
    assert mixer.q_norm.weight.grad is not None
    assert mixer.qkv.weight.grad.abs().max() > 1e-6


def test_mistakes_are_named():
    assert AttentionTaps()(build("qwen3-next-tiny")) is not None
    with pytest.raises(UsageError, match="layer 0 has no attention weights to tap: it is a GatedDeltaNet"):
        AttentionTaps((0,))(build("qwen3-next-tiny"))
    with pytest.raises(UsageError, match="this model has layers 0 to 1"):
        AttentionTaps((2,))(build("gpt2-tiny"))
    with pytest.raises(UsageError, match="this model has layers"):
        AttentionTaps(())(build("gpt2-tiny"))
