"""OLMo 2 (OLMo Team 2024, arXiv:2501.00656). What is new after Llama:

- The norms stand *behind* the layers, before the sum: x + norm(layer(x)). No norm stands before a layer, and the
  embedding enters as it is.
- Queries and keys are normalized before the rotation, over all heads together: the mean square runs over the whole
  projection, and the weight has an entry for each of its rows.
- Base 500,000, no stretch; eps 1e-6 in the released files. Weights, data and code are open.

Commonly got wrong: `post_attention_layernorm` is the norm behind attention here, the one before the MLP in Llama; a q/k
norm per head (as in Qwen3) has other numbers. Differs: in bfloat16 the published code multiplies by a norm's weight and
rotates in float32 before it casts back; here the cast comes first, as in Llama.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import AcrossHeads, RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import (
    POST_NORMS,
    Names,
    attention_names,
    decoder_names,
    expand_layers,
    layer_names,
    swiglu_names,
)


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, as OLMo 2's config.json has them."""

    rms_norm_eps: float = hf_default(1e-5, default=1e-6)
    mlp_bias: bool = constant_field(default=False)


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layers with the norms behind them, and normalized queries and keys."""
    layer: Any = llama.block(config, layer_idx)
    attention, mlp = layer.mixer.layer, layer.feed_forward.layer
    widths = [heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)]
    attention.q_norm, attention.k_norm = (AcrossHeads(RMSNorm(width, config.rms_norm_eps)) for width in widths)
    return Block(
        mixer=Sublayer(nn.Identity(), attention, post_norm=RMSNorm(config.hidden_size, config.rms_norm_eps)),
        feed_forward=Sublayer(nn.Identity(), mlp, post_norm=RMSNorm(config.hidden_size, config.rms_norm_eps)),
    )


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("olmo2", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings, norms=POST_NORMS)
    table |= attention_names(bias=config.attention_bias) | swiglu_names() | layer_names(QK_NORMS)
    return expand_layers(table, config.num_hidden_layers)


QK_NORMS = {f"mixer.layer.{part}_norm.norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}


def olmo2_config(**numbers: Any) -> Config:
    """The published sizes share vocabulary, context, head_dim and base."""
    shared: dict[str, Any] = {"vocab_size": 100_352, "max_position_embeddings": 4096, "head_dim": 128}
    shared |= {"tie_word_embeddings": False} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 500_000.0))


TINY = olmo2_config(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    intermediate_size=64, max_position_embeddings=128,
)  # fmt: skip
PRESETS = preset_table(
    SIZES,
    ("olmo2-1b", "allenai/OLMo-2-0425-1B", 1_484_916_736, 16, 2048, 16, 16, 8192),
    ("olmo2-7b", "allenai/OLMo-2-1124-7B", 7_298_617_344, 32, 4096, 32, 32, 11_008),
    ("olmo2-13b", "allenai/OLMo-2-1124-13B", 13_716_198_400, 40, 5120, 40, 40, 13_824),
    ("olmo2-32b", "allenai/OLMo-2-0325-32B", 32_234_279_936, 64, 5120, 40, 8, 27_648),
    make=olmo2_config,
    eos=(100_257,),
)

FAMILY = Family(
    name="olmo2",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"olmo2": "Olmo2ForCausalLM"},
    presets=(*PRESETS, Preset("olmo2-tiny", TINY)),
)
