"""EXAONE 4 (LG AI Research 2025, arXiv:2507.11407). What is new after Llama:

- The norms stand behind the layers, before the sum, as in OLMo 2; queries and keys are normalized per head, as in
  Qwen3.
- The 32B model: three layers of four see a window of 4096 and have rotary positions; the fourth sees everything and has
  none. The 1.2B model has neither windows nor layers without rotation.
- Llama 3's stretch, with a factor of 16.

Commonly got wrong: whether a full layer is rotated depends on the whole model: yes where there is no window at all.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import Llama3Scaling, NoRotary, RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default, per_layer
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import (
    POST_NORMS,
    Names,
    attention_names,
    decoder_names,
    expand_layers,
    swiglu_names,
)
from llm_quest.models.windows import FULL, SLIDING, layer_pattern, layer_window, require_layer_types


def default_layer_types(c: Any) -> tuple[str, ...]:
    """Every fourth layer sees everything, or as sliding_window_pattern says in a number or letters (LLLG)."""
    pattern = c.json.get("sliding_window_pattern") or 4
    period = len(pattern) if isinstance(pattern, str) else pattern
    return layer_pattern(c.num_hidden_layers, 1 if c.sliding_window is None else period)


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, as EXAONE 4's config.json has them; sliding_window: of the layers whose type is
    sliding_attention."""

    num_key_value_heads: int = hf_default(32)
    rms_norm_eps: float = 1e-5
    attention_bias: bool = constant_field(default=False)
    mlp_bias: bool = constant_field(default=False)
    sliding_window: int | None = hf_default(4096, default=None)
    layer_types: tuple[str, ...] = per_layer(FULL, SLIDING, hf_default=default_layer_types, default=())

    def __post_init__(self) -> None:
        require_layer_types(self)


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layers with the norms behind them, and normalized queries and keys."""
    layer: Any = llama.block(config, layer_idx)
    attention = layer.mixer.layer
    attention.q_norm, attention.k_norm = (RMSNorm(config.head_dim, config.rms_norm_eps) for _ in range(2))
    attention.sliding_window = layer_window(config, layer_idx)
    if config.sliding_window is not None and attention.sliding_window is None:
        attention.rotary = NoRotary()
    first, second = (RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
    return Block(
        mixer=Sublayer(nn.Identity(), attention, post_norm=first),
        feed_forward=Sublayer(nn.Identity(), layer.feed_forward.layer, post_norm=second),
    )


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("exaone4", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings, norms=POST_NORMS)
    return expand_layers(table | attention_names(qk_norm=True) | swiglu_names(), config.num_hidden_layers)


def exaone4_config(pattern: int, **numbers: Any) -> Config:
    """The published sizes share vocabulary, base and stretch. pattern: which layers see everything."""
    shared: dict[str, Any] = {"vocab_size": 102_400} | numbers
    shared |= {"layer_types": layer_pattern(shared["num_hidden_layers"], pattern)}
    scaling = Llama3Scaling(16.0)
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 1_000_000.0, scaling))


PRESETS = preset_table(
    f"{SIZES} head_dim tie_word_embeddings max_position_embeddings sliding_window pattern",
    (
        "exaone4-1.2b", "LGAI-EXAONE/EXAONE-4.0-1.2B", 1_279_391_488,
        30, 2048, 32, 8, 4096, 64, True, 65_536, None, 1,
    ),
    (
        "exaone4-32b", "LGAI-EXAONE/EXAONE-4.0-32B", 32_003_216_384,
        64, 5120, 40, 8, 27_392, 128, False, 131_072, 4096, 4,
    ),
    make=exaone4_config,
    eos=(361,),
)  # fmt: skip
TINY = Config(
    97, 48, 3, 4, 2, 12, 64, 128, RotaryEmbedding(12, 10_000.0), True, sliding_window=5,
    layer_types=(SLIDING, FULL, SLIDING),
)  # fmt: skip

FAMILY = Family(
    name="exaone4",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"exaone4": "Exaone4ForCausalLM"},
    presets=(*PRESETS, Preset("exaone4-tiny", TINY)),
)
