"""Multi-head latent attention: absorbed is expanded; the cache holds latent and rotary key only; rescaling scales the
logits."""

import pytest
import torch

from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.latent_attention import MultiHeadLatentAttention
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.scope import Scope


def layer(q_rank=12) -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    made = MultiHeadLatentAttention(
        32,
        num_attention_heads=4,
        q_lora_rank=q_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        rotary=RotaryEmbedding(4, 10_000.0, interleaved=True),
        attend=ScaledDotProduct(0.3),
    ).double()
    with torch.no_grad():
        for norm in (made.kv_norm, made.q_norm):
            if not isinstance(norm, torch.nn.Identity):
                norm.weight.normal_(1.0, 0.3)
    return made


@torch.no_grad()
def test_absorbed_is_expanded():
    mixer, x = layer(), torch.randn(2, 9, 32, dtype=torch.float64)
    results = []
    for pays in (True, False):
        mixer.is_absorbed_cheaper = lambda queries, keys, pays=pays: pays
        results.append(mixer(x, Scope.unpadded(x[..., 0])))
    torch.testing.assert_close(*results, atol=1e-13, rtol=1e-11)


def test_absorbing_pays_for_one_query_and_a_long_memory_and_not_for_a_prefill():
    mixer = MultiHeadLatentAttention(
        8,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rotary=RotaryEmbedding(64, 1e4),
        attend=ScaledDotProduct(1.0),
    )
    assert mixer.is_absorbed_cheaper(1, 4096)
    assert not mixer.is_absorbed_cheaper(4096, 4096)


@torch.no_grad()
def test_the_cache_holds_one_latent_and_one_rotary_key_per_token():
    mixer, x = layer(), torch.randn(2, 7, 32, dtype=torch.float64)
    part = mixer.new_cache(2, 10)
    cache = Cache([part], 2, 10)
    mixer(x, Scope.unpadded(x[..., 0], cache=cache).for_layer(0))
    assert part.nbytes() == 2 * (10 + 1) * (16 + 4) * 8


@pytest.mark.parametrize("q_rank", [12, None])
@torch.no_grad()
def test_rescaling_multiplies_each_heads_logits_and_leaves_the_shared_key(q_rank):
    mixer, x = layer(q_rank), torch.randn(1, 6, 32, dtype=torch.float64)
    seen = []

    def spy(attend, inputs, output):
        q, k = inputs[:2]
        seen.append(torch.einsum("bthd,bshd->bhts", q, k.expand(-1, -1, q.shape[2], -1)))

    mixer.attend.register_forward_hook(spy)
    mixer.is_absorbed_cheaper = lambda queries, keys: False
    shared = mixer.kv_down.weight.clone()
    mixer(x, Scope.unpadded(x[..., 0]))
    gamma = torch.tensor([0.5, 1.0, 0.25, 0.9], dtype=torch.float64)
    mixer.rescale_logits_(gamma)
    mixer(x, Scope.unpadded(x[..., 0]))
    torch.testing.assert_close(seen[1], seen[0] * gamma[None, :, None, None], atol=1e-12, rtol=1e-10)
    assert torch.equal(mixer.kv_down.weight, shared)
