"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): the classic sparse mixture of experts. What is new after Llama:

- Eight feed-forward layers instead of one; a router sends each token to two of them and weighs their outputs.
- The weights are the softmax over all experts, renormalized over the chosen two.
- Heads untied from the embedding, base 1e6, no stretch of the positions.

Commonly got wrong: the published w1 is the gate, w3 the up and w2 the down projection; the load-balancing loss
counts all k choices, so at uniform routing it is k, not 1 (transformers pools all layers: `router_aux_loss_pooled`).
"""

from __future__ import annotations

from typing import Any, Literal

from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.experts import Experts
from llm_quest.layers.moe import MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.config_fields import config_dataclass, hf_default, kv_heads_default, rope_field, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family, preset_table
from llm_quest.models.weight_names import Names, attention_names, decoder_names, expand_layers, expert_names


@config_dataclass
class Config:
    """Mixtral's numbers, as config.json has them. intermediate_size: of one expert; sliding_window: None for all
    tokens."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = kv_heads_default(8)
    head_dim: int = hf_default(lambda c: c.hidden_size // c.num_attention_heads)
    intermediate_size: int
    num_local_experts: int = spelled("num_local_experts", also=("num_experts",), hf_default=8)
    num_experts_per_tok: int = hf_default(2)
    max_position_embeddings: int = hf_default(131_072)
    rotary: RotaryEmbedding = rope_field(theta=1_000_000.0)
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.001
    hidden_act: Literal["silu"] = "silu"


def block(config: Config, layer_idx: int) -> Block:
    """One layer: grouped-query attention, then two of the experts."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary=config.rotary,
        sliding_window=config.sliding_window,
    )
    router = SoftmaxRouter(
        config.hidden_size,
        config.num_local_experts,
        top_k=config.num_experts_per_tok,
        norm_topk_prob=True,
        aux_loss_coef=config.router_aux_loss_coef,
    )
    experts = Experts(config.num_local_experts, config.hidden_size, config.intermediate_size, F.silu)
    return Block(
        mixer=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), attention),
        feed_forward=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), MixtureOfExperts(router, experts)),
    )


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("mixtral", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    theirs = "model.layers.{i}.block_sparse_moe."
    experts = expert_names(config.num_local_experts, theirs=theirs, gate="w1", up="w3", down="w2")
    table = decoder_names(tied=config.tie_word_embeddings) | attention_names() | experts
    return expand_layers(table, config.num_hidden_layers)


def mixtral_config(**numbers: Any) -> Config:
    """The two published sizes share vocabulary, experts, key/value heads, head width and base."""
    shared: dict[str, Any] = {"vocab_size": 32_000, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 8}
    shared |= {"num_experts_per_tok": 2} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 1_000_000.0))


COLUMNS = """hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings
    router_aux_loss_coef"""
TINY = mixtral_config(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=32, num_local_experts=4, max_position_embeddings=256,
)  # fmt: skip
PRESETS = preset_table(
    COLUMNS,
    ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", 46_702_792_704, 4096, 32, 32, 14_336, 32_768, 0.02),
    ("mixtral-8x22b", "mistralai/Mixtral-8x22B-v0.1", 140_620_634_112, 6144, 56, 48, 16_384, 65_536, 0.001),
    make=mixtral_config,
    eos=(2,),
)

FAMILY = Family(
    name="mixtral",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"mixtral": "MixtralForCausalLM"},
    presets=(*PRESETS, Preset("mixtral-tiny", TINY)),
)
