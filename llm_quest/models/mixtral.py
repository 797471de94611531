"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): the classic sparse mixture of experts. What is new after Llama:

- Eight feed-forward layers instead of one; a router sends each token to two of them and weighs their outputs.
- The weights are the softmax over all experts, renormalised over the chosen two.
- Heads untied from the embedding, base 1e6, no stretch of the positions.

Commonly got wrong: the published w1 is the gate, w3 the up and w2 the down projection; the load-balancing loss pools
all layers and counts all k choices, so at uniform routing it is k, not 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import functional as F

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.lm_head import LMHead
from llm_quest.layers.moe import Experts, MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import (
    ConcatRows,
    Family,
    PublishedWeight,
    WeightMap,
    expand_layers,
    publish_rotary,
    read_rotary,
    require_field,
    require_value,
    stack_experts,
)


@dataclass(frozen=True)
class Config:
    """Mixtral's numbers. num_local_experts: feed-forward layers a layer has; num_experts_per_tok: how many a token
    visits; intermediate_size: the width of each."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rotary: RotaryEmbedding
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.001


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
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab_size, config.hidden_size)
    return Decoder(
        ModelSpec("mixtral", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        head=LMHead(
            config.hidden_size, config.vocab_size, tied_embedding=embed.token if config.tie_word_embeddings else None
        ),
    )


def names(config: Config) -> WeightMap:
    """Our parameters and their published names."""
    layer, moe = "model.layers.{i}.", "model.layers.{i}.block_sparse_moe."
    table: dict[str, PublishedWeight] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": ConcatRows(*(f"{layer}self_attn.{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{layer}self_attn.o_proj.weight",
        "blocks.{i}.feed_forward.norm.weight": f"{layer}post_attention_layernorm.weight",
        "blocks.{i}.feed_forward.layer.router.weight": f"{moe}gate.weight",
        "blocks.{i}.feed_forward.layer.experts.gate_up": stack_experts(
            ConcatRows(moe + "experts.{e}.w1.weight", moe + "experts.{e}.w3.weight"), config.num_local_experts
        ),
        "blocks.{i}.feed_forward.layer.experts.down": stack_experts(
            moe + "experts.{e}.w2.weight", config.num_local_experts
        ),
        "norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        table["head.weight"] = "lm_head.weight"
    return expand_layers(table, config.num_hidden_layers)


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    require_value(hf_config, "hidden_act", "silu")
    hidden_size, num_attention_heads = (
        require_field(hf_config, "hidden_size"),
        require_field(hf_config, "num_attention_heads"),
    )
    head_dim = hf_config.get("head_dim") or hidden_size // num_attention_heads
    return Config(
        vocab_size=require_field(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=require_field(hf_config, "num_hidden_layers"),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=hf_config.get("num_key_value_heads") or num_attention_heads,
        head_dim=head_dim,
        intermediate_size=require_field(hf_config, "intermediate_size"),
        num_local_experts=hf_config.get("num_local_experts", 8),
        num_experts_per_tok=hf_config.get("num_experts_per_tok", 2),
        max_position_embeddings=hf_config.get("max_position_embeddings", 131_072),
        rotary=read_rotary(hf_config, head_dim, 1_000_000.0),
        sliding_window=hf_config.get("sliding_window"),
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
        rms_norm_eps=hf_config.get("rms_norm_eps", 1e-5),
        router_aux_loss_coef=hf_config.get("router_aux_loss_coef", 0.001),
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "max_position_embeddings": config.max_position_embeddings,
        **publish_rotary(config.rotary),
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "hidden_act": "silu",
    }


def mixtral_config(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    max_position_embeddings: int,
    *,
    balance: float,
) -> Config:
    """The two published sizes share vocabulary, experts, key/value heads, head width and base."""
    rotary = RotaryEmbedding(128, 1_000_000.0)
    return Config(
        32_000,
        hidden_size,
        num_hidden_layers,
        num_attention_heads,
        8,
        128,
        intermediate_size,
        8,
        2,
        max_position_embeddings,
        rotary,
        router_aux_loss_coef=balance,
    )


FAMILY = Family(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=init_depth_scaled_,
    names=names,
    read=read,
    publish=publish,
    presets=(
        Preset(
            "mixtral-8x7b",
            mixtral_config(4096, 32, 32, 14_336, 32_768, balance=0.02),
            46_702_792_704,
            "mistralai/Mixtral-8x7B-v0.1",
            eos_token_ids=(2,),
        ),
        Preset(
            "mixtral-8x22b",
            mixtral_config(6144, 56, 48, 16_384, 65_536, balance=0.001),
            140_620_634_112,
            "mistralai/Mixtral-8x22B-v0.1",
            eos_token_ids=(2,),
        ),
        Preset("mixtral-tiny", Config(97, 48, 2, 4, 2, 16, 32, 4, 2, 256, RotaryEmbedding(16, 1_000_000.0))),
    ),
)
