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

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.lm_head import LMHead
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import Llama3Scaling, RotaryEmbedding
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
)


@dataclass(frozen=True)
class Config:
    """Llama's numbers. num_key_value_heads: key/value heads; max_position_embeddings: longest sequence it was made for;
    tie_word_embeddings: output = embedding."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rotary: RotaryEmbedding
    tie_word_embeddings: bool
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False


def block(config: Config, layer_idx: int) -> Block:
    """One layer: grouped-query attention, then SwiGLU."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary=config.rotary,
        bias=config.attention_bias,
    )
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, F.silu, bias=config.mlp_bias)
    return Block(
        mixer=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), attention),
        feed_forward=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), mlp),
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab_size, config.hidden_size)
    return Decoder(
        ModelSpec("llama", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        head=LMHead(
            config.hidden_size, config.vocab_size, tied_embedding=embed.token if config.tie_word_embeddings else None
        ),
    )


def names(config: Config) -> WeightMap:
    """Our parameters and their published names."""
    attention, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    table: dict[str, PublishedWeight] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": "model.layers.{i}.input_layernorm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": ConcatRows(*(f"{attention}{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{attention}o_proj.weight",
        "blocks.{i}.feed_forward.norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "blocks.{i}.feed_forward.layer.gate_up.weight": ConcatRows(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
        "blocks.{i}.feed_forward.layer.down.weight": f"{mlp}down_proj.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        table["head.weight"] = "lm_head.weight"
    if config.attention_bias:
        table["blocks.{i}.mixer.layer.qkv.bias"] = ConcatRows(*(f"{attention}{part}_proj.bias" for part in "qkv"))
        table["blocks.{i}.mixer.layer.out.bias"] = f"{attention}o_proj.bias"
    if config.mlp_bias:
        table["blocks.{i}.feed_forward.layer.gate_up.bias"] = ConcatRows(f"{mlp}gate_proj.bias", f"{mlp}up_proj.bias")
        table["blocks.{i}.feed_forward.layer.down.bias"] = f"{mlp}down_proj.bias"
    return expand_layers(table, config.num_hidden_layers)


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    require_value(hf_config, "hidden_act", "silu")
    hidden_size, num_attention_heads = (
        require_field(hf_config, "hidden_size"),
        require_field(hf_config, "num_attention_heads"),
    )
    head_dim = hf_config.get("head_dim") or hidden_size // num_attention_heads
    max_position_embeddings = hf_config.get("max_position_embeddings", 2048)
    return Config(
        vocab_size=require_field(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=require_field(hf_config, "num_hidden_layers"),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=hf_config.get("num_key_value_heads") or num_attention_heads,
        head_dim=head_dim,
        intermediate_size=require_field(hf_config, "intermediate_size"),
        max_position_embeddings=max_position_embeddings,
        rotary=read_rotary(hf_config, head_dim, max_position_embeddings=max_position_embeddings),
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
        rms_norm_eps=hf_config.get("rms_norm_eps", 1e-6),
        attention_bias=hf_config.get("attention_bias", False),
        mlp_bias=hf_config.get("mlp_bias", False),
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
        "max_position_embeddings": config.max_position_embeddings,
        **publish_rotary(config.rotary),
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
    }


def llama_config(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    head_dim: int,
    intermediate_size: int,
    factor: float,
    tie_word_embeddings: bool,
) -> Config:
    """The published sizes of 3.1 and 3.2 share vocabulary, context, key/value heads and base."""
    rotary = RotaryEmbedding(
        head_dim,
        500_000.0,
        Llama3Scaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    )
    return Config(
        128_256,
        hidden_size,
        num_hidden_layers,
        num_attention_heads,
        8,
        head_dim,
        intermediate_size,
        131_072,
        rotary,
        tie_word_embeddings,
    )


FAMILY = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=init_depth_scaled_,
    names=names,
    read=read,
    publish=publish,
    keys_to_ignore=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    presets=(
        Preset(
            "llama3.2-1b",
            llama_config(2048, 16, 32, 64, 8192, 32.0, True),
            1_235_814_400,
            "meta-llama/Llama-3.2-1B",
            eos_token_ids=(128001,),
        ),
        Preset(
            "llama3.2-3b",
            llama_config(3072, 28, 24, 128, 8192, 32.0, True),
            3_212_749_824,
            "meta-llama/Llama-3.2-3B",
            eos_token_ids=(128001,),
        ),
        Preset(
            "llama3.1-8b",
            llama_config(4096, 32, 32, 128, 14336, 8.0, False),
            8_030_261_248,
            "meta-llama/Llama-3.1-8B",
            eos_token_ids=(128001,),
        ),
        Preset(
            "llama3.2-tiny",
            Config(
                97,
                48,
                2,
                4,
                2,
                16,
                96,
                256,
                RotaryEmbedding(
                    16,
                    500_000.0,
                    Llama3Scaling(32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
                ),
                True,
            ),
        ),
    ),
)
