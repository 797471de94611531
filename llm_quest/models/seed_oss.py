"""Seed-OSS (ByteDance Seed 2025, "Seed-OSS Open-Source Models"). What is new after Llama:

- Biases on queries, keys and values (`attention_bias`, true where a file does not say); the output projection has a
  field of its own (`attention_out_bias`, false).
- 80 heads of 128 on a stream of 5120: queries are twice as wide as the model. Base 1e7 for a context of 524,288.

Commonly got wrong: the two fields for biases; a dropout of 0.1 where a file does not say, which acts in training alone
and is not computed here.
"""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.linear import Linear
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, hf_default, kv_heads_default
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family
from llm_quest.models.weight_names import Names, attention_names, decoder_names, expand_layers, swiglu_names


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, as Seed-OSS's config.json has them. attention_bias: of queries, keys and values."""

    num_key_value_heads: int = kv_heads_default(8)
    head_dim: int = hf_default(128, null=lambda c: c.hidden_size // c.num_attention_heads)
    max_position_embeddings: int = hf_default(524_288)
    rms_norm_eps: float = 1e-6
    attention_bias: bool = hf_default(True, default=True)
    attention_out_bias: bool = False


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer, whose output projection has a bias of its own choice."""
    layer: Any = llama.block(config, layer_idx)
    attention = layer.mixer.layer
    attention.out = Linear(attention.out.in_features, config.hidden_size, bias=config.attention_out_bias)
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("seed_oss", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings) | swiglu_names(bias=config.mlp_bias)
    table |= attention_names(bias=config.attention_bias, out_bias=config.attention_out_bias)
    return expand_layers(table, config.num_hidden_layers)


SEED = Config(155_136, 5120, 64, 80, 8, 128, 27_648, 524_288, RotaryEmbedding(128, 10_000_000.0), False)
TINY = Config(97, 48, 2, 4, 2, 24, 64, 128, RotaryEmbedding(24, 10_000.0), False)
FAMILY = Family(
    name="seed_oss",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"seed_oss": "SeedOssForCausalLM"},
    presets=(
        Preset("seed-oss-36b", SEED, 36_151_104_512, "ByteDance-Seed/Seed-OSS-36B-Base", eos_token_ids=(2,)),
        Preset("seed-oss-tiny", TINY),
    ),
)
