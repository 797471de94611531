"""Blocks of one sublayer and of two in parallel: what they compute, their caches, and the techniques that edit them.
The decoder's laws run on a model of them (`single and parallel sublayers` in tests/laws)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llm_quest.errors import UsageError
from llm_quest.layers.block import ParallelLayers, SingleBlock, Sublayer
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.kv_cache import KVCache, NoCache
from llm_quest.layers.norm import RMSNorm
from llm_quest.scope import Scope
from llm_quest.techniques.attention_taps import AttentionTaps
from llm_quest.techniques.hyper_connections import HyperConnections
from llm_quest.techniques.qk_clip import QKClip
from tests.laws.subjects import attention, own, random_tokens, shared

NAME = "single and parallel sublayers"


def test_parallel_sublayers_read_the_same_normalized_input(generator: torch.Generator):
    norm, mixer, mlp = RMSNorm(32, 1e-5), attention(32, None), GatedMLP(32, 64, F.silu)
    x = torch.randn(2, 5, 32, generator=generator)
    scope = Scope.unpadded(x)
    y = norm(x)
    expected = x + (mixer(y, scope) + mlp(y, scope))
    assert torch.equal(SingleBlock(Sublayer(norm, ParallelLayers(mixer, mlp)))(x, scope), expected)


def test_only_layers_that_move_information_between_positions_keep_a_cache():
    cache = shared(NAME).new_cache(2, 9)
    assert [type(part) for part in cache.layers] == [KVCache, NoCache, KVCache, NoCache]


def test_the_layers_see_the_tokens_and_other_tokens_change_the_logits():
    """Tokens 3 and 10 have the same hash, 3 and 4 have not: with equal vectors, only the hash tells them apart."""
    model = own(NAME)
    vectors = model.embed.embed_tokens(torch.tensor([[3, 3]]))
    first, same, other = (model(torch.tensor([[3, last]]), None, vectors)[0, 1] for last in (3, 10, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_techniques_act_on_every_form_of_block():
    tokens = random_tokens(shared(NAME), 2, 9)
    wider = HyperConnections(streams=2)(own(NAME))
    torch.testing.assert_close(wider(tokens), shared(NAME)(tokens), atol=1e-5, rtol=0)
    tapped = AttentionTaps((0, 2))(own(NAME))
    records: dict = {}
    assert torch.equal(tapped(tokens, Scope.unpadded(tokens, records=records)), shared(NAME)(tokens))
    assert [found.layer for found in records["attention"]] == [0, 2]
    with pytest.raises(UsageError, match="layer 1 has no attention weights to tap: it is a GatedMLP"):
        AttentionTaps((1,))(own(NAME))
    clip, clipped = QKClip(tau=1e-3), own(NAME).train()
    clip(clipped)(tokens)
    assert clip.on_step_end(clipped, 1)["max_logit"] > 1e-3
