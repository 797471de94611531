"""Gemma 1 (Gemma Team 2024, arXiv:2403.08295). What is new after Llama:

- Every norm scales by 1 + weight.
- Embeddings enter the stream times sqrt(hidden_size), rounded to the weights' dtype; the output matrix, though tied, is
  not scaled.
- GeGLU with the tanh approximation instead of SwiGLU, in a layer eight times as wide as the stream.
- Heads of 256; one key/value head in the 2B model, as many as query heads in the 7B one.

Commonly got wrong: `hidden_act: "gelu"` in the released files means the tanh approximation; the norms behind each layer
and the windows came with Gemma 2 (`gemma.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP, gelu_tanh
from llm_quest.layers.norm import ZeroCenteredRMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, as Gemma 1's config.json has them."""

    num_key_value_heads: int = hf_default(16)
    head_dim: int = hf_default(256)
    max_position_embeddings: int = hf_default(8192)
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-6
    mlp_bias: bool = constant_field(default=False)
    hidden_act: Literal["gelu_pytorch_tanh", "gelu"] = "gelu_pytorch_tanh"  # type: ignore[assignment]
    use_bidirectional_attention: Literal[False] = False


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer with GeGLU and norms that scale by 1 + weight."""
    attention = llama.block(config, layer_idx).mixer.layer
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, gelu_tanh)
    return Block(
        mixer=Sublayer(ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps), attention),
        feed_forward=Sublayer(ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps), mlp),
    )


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    embedding = partial(TokenEmbedding, scale=config.hidden_size**0.5)
    return decoder_of_blocks("gemma1", config, block, embedding, ZeroCenteredRMSNorm)


def gemma1_config(**numbers: Any) -> Config:
    """The two published sizes share vocabulary, context, head_dim and base."""
    shared = {"vocab_size": 256_000, "max_position_embeddings": 8192, "head_dim": 256} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 10_000.0))


TINY = gemma1_config(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
    intermediate_size=64, max_position_embeddings=128,
)  # fmt: skip

FAMILY = Family(
    name="gemma1",
    Config=Config,
    assemble=assemble,
    weight_map=llama.weight_map,
    architectures={"gemma": "GemmaForCausalLM"},
    presets=(
        *preset_table(
            SIZES,
            ("gemma-2b", "google/gemma-2b", 2_506_172_416, 18, 2048, 8, 1, 16_384),
            ("gemma-7b", "google/gemma-7b", 8_537_680_896, 28, 3072, 16, 16, 24_576),
            make=gemma1_config,
            eos=(1,),
        ),
        Preset("gemma1-tiny", TINY),
    ),
)
