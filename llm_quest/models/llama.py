"""Llama 3 (Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783). What is new after GPT-2:

- Positions are rotations of queries and keys (RoPE), not learned vectors; 3.1 and later stretch the slow ones to reach
  131,072.
- RMSNorm instead of LayerNorm: no mean, no bias.
- Grouped queries: several query heads share one key/value head, so the cache is smaller by that factor.
- A gated feed-forward layer (SwiGLU) instead of the MLP.
- No biases anywhere. (The config has the head's width as a number of its own; in every Llama 3 it is width / heads.)
- The small models tie the output matrix to the embedding, the large ones do not.

Commonly got wrong: the stretch factor is 32 in Llama 3.2 but 8 in 3.1; eps is 1e-5; Meta's own files rotate
neighbouring pairs where these published ones rotate halves.
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
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.head import Unembed
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import Llama3, Rotary
from llm_quest.models.decoder import Decoder
from llm_quest.models.page import Names, Page, Published, Rows, need, only, per_layer, publish_rotary, read_rotary


@dataclass(frozen=True)
class Config:
    """Llama's numbers. groups: key/value heads; context: longest sequence it was made for; tied: output = embedding."""

    vocab: int
    width: int
    layers: int
    heads: int
    groups: int
    head_width: int
    hidden: int
    context: int
    rotary: Rotary
    tied: bool
    eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False


def block(config: Config, layer: int) -> Block:
    """One layer: grouped-query attention, then SwiGLU."""
    attention = GroupedQueryAttention(
        config.width,
        heads=config.heads,
        groups=config.groups,
        head_width=config.head_width,
        rotary=config.rotary,
        bias=config.attention_bias,
        out_bias=config.attention_bias,
    )
    mlp = GatedMLP(config.width, config.hidden, F.silu, bias=config.mlp_bias)
    return Block(
        mixer=Sublayer(RMSNorm(config.width, config.eps), attention),
        ffn=Sublayer(RMSNorm(config.width, config.eps), mlp),
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab, config.width)
    return Decoder(
        Card("llama", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=RMSNorm(config.width, config.eps),
        head=Unembed(config.width, config.vocab, tied=embed.token if config.tied else None),
    )


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    attention, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    table: dict[str, Published] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": "model.layers.{i}.input_layernorm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": Rows(*(f"{attention}{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{attention}o_proj.weight",
        "blocks.{i}.ffn.norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "blocks.{i}.ffn.layer.gate_up.weight": Rows(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
        "blocks.{i}.ffn.layer.down.weight": f"{mlp}down_proj.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tied:
        table["head.weight"] = "lm_head.weight"
    if config.attention_bias:
        table["blocks.{i}.mixer.layer.qkv.bias"] = Rows(*(f"{attention}{part}_proj.bias" for part in "qkv"))
        table["blocks.{i}.mixer.layer.out.bias"] = f"{attention}o_proj.bias"
    if config.mlp_bias:
        table["blocks.{i}.ffn.layer.gate_up.bias"] = Rows(f"{mlp}gate_proj.bias", f"{mlp}up_proj.bias")
        table["blocks.{i}.ffn.layer.down.bias"] = f"{mlp}down_proj.bias"
    return per_layer(table, config.layers)


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    only(published, "hidden_act", "silu")
    width, heads = need(published, "hidden_size"), need(published, "num_attention_heads")
    head_width = published.get("head_dim") or width // heads
    context = published.get("max_position_embeddings", 2048)
    return Config(
        vocab=need(published, "vocab_size"),
        width=width,
        layers=need(published, "num_hidden_layers"),
        heads=heads,
        groups=published.get("num_key_value_heads") or heads,
        head_width=head_width,
        hidden=need(published, "intermediate_size"),
        context=context,
        rotary=read_rotary(published, head_width, context=context),
        tied=published.get("tie_word_embeddings", False),
        eps=published.get("rms_norm_eps", 1e-6),
        attention_bias=published.get("attention_bias", False),
        mlp_bias=published.get("mlp_bias", False),
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
        "max_position_embeddings": config.context,
        **publish_rotary(config.rotary),
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
    }


def sized(width: int, layers: int, heads: int, head_width: int, hidden: int, factor: float, tied: bool) -> Config:
    """The published sizes of 3.1 and 3.2 share vocabulary, context, key/value heads and base."""
    rotary = Rotary(head_width, 500_000.0, Llama3(factor, low=1.0, high=4.0, original=8192))
    return Config(128_256, width, layers, heads, 8, head_width, hidden, 131_072, rotary, tied)


PAGE = Page(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=fill_by_depth_,
    names=names,
    read=read,
    publish=publish,
    ignore=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    presets=(
        Preset(
            "llama3.2-1b",
            sized(2048, 16, 32, 64, 8192, 32.0, True),
            1_235_814_400,
            "meta-llama/Llama-3.2-1B",
            eos=(128001,),
        ),
        Preset(
            "llama3.2-3b",
            sized(3072, 28, 24, 128, 8192, 32.0, True),
            3_212_749_824,
            "meta-llama/Llama-3.2-3B",
            eos=(128001,),
        ),
        Preset(
            "llama3.1-8b",
            sized(4096, 32, 32, 128, 14336, 8.0, False),
            8_030_261_248,
            "meta-llama/Llama-3.1-8B",
            eos=(128001,),
        ),
        Preset(
            "llama3.2-tiny",
            Config(
                97, 48, 2, 4, 2, 16, 96, 256, Rotary(16, 500_000.0, Llama3(32.0, low=1.0, high=4.0, original=64)), True
            ),
        ),
    ),
)
