"""StarCoder2 (Lozhkov et al. 2024, arXiv:2402.19173). What is new after Llama (or what stayed of GPT-2):

- LayerNorm with bias instead of RMSNorm, and biases on every projection.
- A plain MLP with the tanh GELU instead of SwiGLU.
- A window of 4096 in all layers; two or four key/value heads.

Commonly got wrong: c_fc and c_proj have GPT-2's names but are stored (out, in); the output matrix is tied but for the
15B model.
"""

from __future__ import annotations

from typing import Any, Literal

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import MLP, gelu_tanh
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama, mistral
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import (
    OURS,
    THEIRS,
    Names,
    attention_names,
    decoder_names,
    expand_layers,
    module_names,
    norm_biases,
)


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, as StarCoder2's config.json has them. rms_norm_eps: LayerNorm's; attention_bias: use_bias, of
    the MLP too; sliding_window: how many tokens a layer sees, itself included; None: all."""

    num_key_value_heads: int = hf_default(2)
    max_position_embeddings: int = hf_default(4096)
    tie_word_embeddings: bool = hf_default(True)
    rms_norm_eps: float = spelled("norm_epsilon", default=1e-5)
    attention_bias: bool = spelled("use_bias", default=True)
    mlp_bias: bool = constant_field(default=False)
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"  # type: ignore[assignment]
    sliding_window: int | None = None


def block(config: Config, layer_idx: int) -> Block:
    """Mistral's attention and GPT-2's MLP, each behind LayerNorm."""
    attention = mistral.block(config, layer_idx).mixer.layer  # type: ignore[arg-type]
    mlp = MLP(config.hidden_size, config.intermediate_size, gelu_tanh, bias=config.attention_bias)
    return Block(
        mixer=Sublayer(LayerNorm(config.hidden_size, config.rms_norm_eps), attention),
        feed_forward=Sublayer(LayerNorm(config.hidden_size, config.rms_norm_eps), mlp),
    )


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("starcoder2", config, block, TokenEmbedding, LayerNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    bias, ours, theirs = config.attention_bias, f"{OURS}feed_forward.layer.", f"{THEIRS}mlp."
    table = norm_biases(decoder_names(tied=config.tie_word_embeddings)) | attention_names(bias=bias)
    table |= module_names({f"{ours}up": f"{theirs}c_fc", f"{ours}down": f"{theirs}c_proj"}, bias=bias)
    return expand_layers(table, config.num_hidden_layers)


def starcoder2_config(rope_theta: float, **numbers: Any) -> Config:
    """The published sizes share vocabulary, context, window and head_dim."""
    shared: dict[str, Any] = {"vocab_size": 49_152, "max_position_embeddings": 16_384, "head_dim": 128}
    shared |= {"sliding_window": 4096} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], rope_theta))


TINY = starcoder2_config(
    10_000.0, vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=12, intermediate_size=64, max_position_embeddings=128, sliding_window=5, tie_word_embeddings=True,
)  # fmt: skip
PRESETS = preset_table(
    f"{SIZES} rope_theta tie_word_embeddings",
    ("starcoder2-3b", "bigcode/starcoder2-3b", 3_030_371_328, 30, 3072, 24, 2, 12_288, 999_999.4420358813, True),
    ("starcoder2-7b", "bigcode/starcoder2-7b", 7_173_923_840, 32, 4608, 36, 4, 18_432, 1_000_000.0, True),
    ("starcoder2-15b", "bigcode/starcoder2-15b", 15_957_889_024, 40, 6144, 48, 4, 24_576, 100_000.0, False),
    make=starcoder2_config,
    eos=(0,),
)

FAMILY = Family(
    name="starcoder2",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"starcoder2": "Starcoder2ForCausalLM"},
    presets=(*PRESETS, Preset("starcoder2-tiny", TINY)),
)
