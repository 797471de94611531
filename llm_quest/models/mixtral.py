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

from llm_quest.contracts import Card, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.head import Unembed
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.moe import Experts, MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import Rotary
from llm_quest.models.decoder import Decoder
from llm_quest.models.page import (
    Names,
    Page,
    Published,
    Rows,
    need,
    only,
    per_expert,
    per_layer,
    publish_rotary,
    read_rotary,
)


@dataclass(frozen=True)
class Config:
    """Mixtral's numbers. experts: feed-forward layers a layer has; top: how many a token visits; hidden: the width of
    each."""

    vocab: int
    width: int
    layers: int
    heads: int
    groups: int
    head_width: int
    hidden: int
    experts: int
    top: int
    context: int
    rotary: Rotary
    window: int | None = None
    tied: bool = False
    eps: float = 1e-5
    balance: float = 0.001


def block(config: Config, layer: int) -> Block:
    """One layer: grouped-query attention, then two of the experts."""
    attention = GroupedQueryAttention(
        config.width,
        heads=config.heads,
        groups=config.groups,
        head_width=config.head_width,
        rotary=config.rotary,
        window=config.window,
    )
    router = SoftmaxRouter(config.width, config.experts, top=config.top, renormalize=True, balance=config.balance)
    experts = Experts(config.experts, config.width, config.hidden, F.silu)
    return Block(
        mixer=Sublayer(RMSNorm(config.width, config.eps), attention),
        ffn=Sublayer(RMSNorm(config.width, config.eps), MixtureOfExperts(router, experts)),
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab, config.width)
    return Decoder(
        Card("mixtral", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=RMSNorm(config.width, config.eps),
        head=Unembed(config.width, config.vocab, tied=embed.token if config.tied else None),
    )


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    layer, moe = "model.layers.{i}.", "model.layers.{i}.block_sparse_moe."
    table: dict[str, Published] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": Rows(*(f"{layer}self_attn.{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{layer}self_attn.o_proj.weight",
        "blocks.{i}.ffn.norm.weight": f"{layer}post_attention_layernorm.weight",
        "blocks.{i}.ffn.layer.router.weight": f"{moe}gate.weight",
        "blocks.{i}.ffn.layer.experts.gate_up": per_expert(
            Rows(moe + "experts.{e}.w1.weight", moe + "experts.{e}.w3.weight"), config.experts
        ),
        "blocks.{i}.ffn.layer.experts.down": per_expert(moe + "experts.{e}.w2.weight", config.experts),
        "norm.weight": "model.norm.weight",
    }
    if not config.tied:
        table["head.weight"] = "lm_head.weight"
    return per_layer(table, config.layers)


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    only(published, "hidden_act", "silu")
    width, heads = need(published, "hidden_size"), need(published, "num_attention_heads")
    head_width = published.get("head_dim") or width // heads
    return Config(
        vocab=need(published, "vocab_size"),
        width=width,
        layers=need(published, "num_hidden_layers"),
        heads=heads,
        groups=published.get("num_key_value_heads") or heads,
        head_width=head_width,
        hidden=need(published, "intermediate_size"),
        experts=published.get("num_local_experts", 8),
        top=published.get("num_experts_per_tok", 2),
        context=published.get("max_position_embeddings", 131_072),
        rotary=read_rotary(published, head_width, 1_000_000.0),
        window=published.get("sliding_window"),
        tied=published.get("tie_word_embeddings", False),
        eps=published.get("rms_norm_eps", 1e-5),
        balance=published.get("router_aux_loss_coef", 0.001),
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.top,
        "max_position_embeddings": config.context,
        **publish_rotary(config.rotary),
        "sliding_window": config.window,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.eps,
        "router_aux_loss_coef": config.balance,
        "hidden_act": "silu",
    }


def sized(width: int, layers: int, heads: int, hidden: int, context: int, *, balance: float) -> Config:
    """The two published sizes share vocabulary, experts, key/value heads, head width and base."""
    rotary = Rotary(128, 1_000_000.0)
    return Config(32_000, width, layers, heads, 8, 128, hidden, 8, 2, context, rotary, balance=balance)


PAGE = Page(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=fill_by_depth_,
    names=names,
    read=read,
    publish=publish,
    presets=(
        Preset(
            "mixtral-8x7b",
            sized(4096, 32, 32, 14_336, 32_768, balance=0.02),
            46_702_792_704,
            "mistralai/Mixtral-8x7B-v0.1",
            eos=(2,),
        ),
        Preset(
            "mixtral-8x22b",
            sized(6144, 56, 48, 16_384, 65_536, balance=0.001),
            140_620_634_112,
            "mistralai/Mixtral-8x22B-v0.1",
            eos=(2,),
        ),
        Preset("mixtral-tiny", Config(97, 48, 2, 4, 2, 16, 32, 4, 2, 256, Rotary(16, 1_000_000.0))),
    ),
)
