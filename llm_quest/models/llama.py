"""Llama 3 (Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783). What is new after GPT-2:

- Positions rotate queries and keys (RoPE) instead of being learned vectors; 3.1 and later stretch the slow rotations to
  reach 131,072.
- RMSNorm instead of LayerNorm: no mean, no bias.
- Grouped queries: several query heads share one key/value head, so the cache is smaller by that factor.
- A gated feed-forward layer (SwiGLU) instead of the MLP.
- No biases anywhere. (The config has head_dim as a number of its own; in every Llama 3 it is hidden_size / heads.)
- The small models tie the output matrix to the embedding, the large ones do not.

Commonly got wrong: the stretch factor is 32 in Llama 3.2 but 8 in 3.1; eps is 1e-5; Meta's own files rotate
neighboring pairs where these published ones rotate halves.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import Llama3Scaling, RotaryEmbedding
from llm_quest.models.config_fields import config_dataclass, hf_default, rope_field
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import WeightMap, attention_names, decoder_names, expand_layers, swiglu_names


@config_dataclass
class Config:
    """Llama's numbers, as config.json has them."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = hf_default(lambda c: c.num_attention_heads)
    head_dim: int = hf_default(lambda c: c.hidden_size // c.num_attention_heads)
    intermediate_size: int
    max_position_embeddings: int = hf_default(2048)
    rotary: RotaryEmbedding = rope_field()
    tie_word_embeddings: bool = hf_default(False)
    rms_norm_eps: float = hf_default(1e-6, default=1e-5)
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Literal["silu"] = "silu"


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
    """The model, before its weights are initialized."""
    return decoder_of_blocks("llama", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings) | attention_names(bias=config.attention_bias)
    return expand_layers(table | swiglu_names(bias=config.mlp_bias), config.num_hidden_layers)


def llama_config(stretch: float | None, rope_theta: float, **numbers: Any) -> Config:
    """A published size: heads are hidden_size / heads wide. stretch: of the slow rotations; None: by nothing."""
    head_dim = numbers["hidden_size"] // numbers["num_attention_heads"]
    rotary = RotaryEmbedding(head_dim, rope_theta, None if stretch is None else Llama3Scaling(stretch))
    return Config(**numbers, head_dim=head_dim, rotary=rotary)


LLAMA3 = preset_table(
    f"{SIZES} stretch tie_word_embeddings",
    ("llama3.2-1b", "meta-llama/Llama-3.2-1B", 1_235_814_400, 16, 2048, 32, 8, 8192, 32.0, True),
    ("llama3.2-3b", "meta-llama/Llama-3.2-3B", 3_212_749_824, 28, 3072, 24, 8, 8192, 32.0, True),
    ("llama3.1-8b", "meta-llama/Llama-3.1-8B", 8_030_261_248, 32, 4096, 32, 8, 14_336, 8.0, False),
    make=partial(llama_config, rope_theta=500_000.0, vocab_size=128_256, max_position_embeddings=131_072),
    eos=(128_001,),
)
SMOLLM2 = preset_table(
    f"{SIZES} rope_theta",
    ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 134_515_008, 30, 576, 9, 3, 1536, 100_000.0),
    ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", 361_821_120, 32, 960, 15, 5, 2560, 100_000.0),
    ("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384, 24, 2048, 32, 32, 8192, 130_000.0),
    make=partial(llama_config, None, vocab_size=49_152, max_position_embeddings=8192, tie_word_embeddings=True),
    eos=(0,),
)
TINY = Config(97, 48, 2, 4, 2, 16, 96, 256, RotaryEmbedding(16, 500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 64)), True)

FAMILY = Family(
    name="llama",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"llama": "LlamaForCausalLM"},
    presets=(*LLAMA3, *SMOLLM2, Preset("llama3.2-tiny", TINY)),
)
