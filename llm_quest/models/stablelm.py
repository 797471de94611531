"""StableLM (Bellagente et al. 2024, "Stable LM 2 1.6B Technical Report", arXiv:2402.17834). What is new after Llama:

- LayerNorm with bias instead of RMSNorm.
- Rotary positions on the first quarter of each head.
- The 1.6B model has biases on queries, keys and values.
- The 12B model is parallel, x + attention(y) + mlp(y) with y = norm(x), and normalizes queries and keys with a weight
  of their own for every head.

Commonly got wrong: the parallel model has one norm, and its files no `post_attention_layernorm`; the quarter holds for
files that do not say so; q/k norms are stored as one tensor a head.
"""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block, ParallelLayers, SingleBlock, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.linear import Linear
from llm_quest.layers.norm import LayerNorm, PerHeadLayerNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default, rope_field, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import (
    OURS,
    THEIRS,
    ConcatRows,
    Names,
    attention_names,
    decoder_names,
    expand_layers,
    norm_biases,
    parallel_names,
    swiglu_names,
)


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, but LayerNorm's eps. attention_bias: use_qkv_bias in config.json, and not of the output."""

    num_key_value_heads: int = hf_default(32)
    max_position_embeddings: int = hf_default(4096)
    rotary: RotaryEmbedding = rope_field(partial=0.25)
    rms_norm_eps: float = spelled("layer_norm_eps", default=1e-5)
    attention_bias: bool = spelled("use_qkv_bias", default=False)
    mlp_bias: bool = constant_field(default=False)
    use_parallel_residual: bool = False
    qk_layernorm: bool = False


def block(config: Config, layer_idx: int) -> Block | SingleBlock:
    """Llama's layers behind LayerNorm: one after the other, or in parallel behind the same norm."""
    layer: Any = llama.block(config, layer_idx)
    attention, mlp = layer.mixer.layer, layer.feed_forward.layer
    attention.out = Linear(attention.out.in_features, config.hidden_size, bias=False)
    if config.qk_layernorm:
        attention.q_norm = PerHeadLayerNorm(config.num_attention_heads, config.head_dim, config.rms_norm_eps)
        attention.k_norm = PerHeadLayerNorm(config.num_key_value_heads, config.head_dim, config.rms_norm_eps)
    first, second = (LayerNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
    if config.use_parallel_residual:
        return SingleBlock(Sublayer(first, ParallelLayers(attention, mlp)))
    return Block(Sublayer(first, attention), Sublayer(second, mlp))


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("stablelm", config, block, TokenEmbedding, LayerNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = norm_biases(decoder_names(tied=config.tie_word_embeddings))
    table |= attention_names(bias=config.attention_bias, out_bias=False) | swiglu_names()
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    table |= per_head_norm_names(**heads) if config.qk_layernorm else {}
    table = parallel_names(table, one_norm=True) if config.use_parallel_residual else table
    return expand_layers(table, config.num_hidden_layers)


def per_head_norm_names(**heads: int) -> Names:
    """The weights of the heads' norms, one tensor for each head."""
    names: Names = {}
    for part, count in heads.items():
        theirs = (f"{THEIRS}self_attn.{part}_layernorm.norms.{head}.weight" for head in range(count))
        names[f"{OURS}mixer.layer.{part}_norm.weight"] = ConcatRows(*theirs)
    return names


def stablelm_config(**numbers: Any) -> Config:
    """The published sizes share context and base, and rotate a quarter of each head."""
    shared = {"max_position_embeddings": 4096, "tie_word_embeddings": False} | numbers
    head_dim = numbers["hidden_size"] // numbers["num_attention_heads"]
    return Config(**shared, head_dim=head_dim, rotary=RotaryEmbedding(head_dim // 4, 10_000.0))


TINY: dict[str, Any] = dict(zip(SIZES.split(), (2, 48, 3, 3, 64), strict=True))
TINY |= {"vocab_size": 97, "max_position_embeddings": 128}
TINY_PRESETS = (
    Preset("stablelm-tiny", stablelm_config(**TINY, attention_bias=True)),
    Preset("stablelm2-tiny", stablelm_config(**TINY, use_parallel_residual=True, qk_layernorm=True)),
)
NONE, BIAS, PARALLEL = (False, False, False), (True, False, False), (False, True, True)
PRESETS = preset_table(
    f"{SIZES} vocab_size attention_bias use_parallel_residual qk_layernorm",
    ("stablelm-3b", "stabilityai/stablelm-3b-4e1t", 2_795_443_200, 32, 2560, 32, 32, 6912, 50_304, *NONE),
    ("stablelm2-1.6b", "stabilityai/stablelm-2-1_6b", 1_644_515_328, 24, 2048, 32, 32, 5632, 100_352, *BIAS),
    ("stablelm2-12b", "stabilityai/stablelm-2-12b", 12_143_185_920, 40, 5120, 32, 8, 13_824, 100_352, *PARALLEL),
    make=stablelm_config,
)

FAMILY = Family(
    name="stablelm",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"stablelm": "StableLmForCausalLM"},
    presets=(*PRESETS, *TINY_PRESETS),
)
