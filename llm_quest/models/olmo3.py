"""OLMo 3 (OLMo Team 2025, "Olmo 3", arXiv:2512.13961). What is new after OLMo 2:

- Three layers of four see a window of 4096, itself included; the fourth sees everything.
- YaRN stretches the rotation of the full layers alone; windowed layers keep the plain one.

Commonly got wrong: a flat `rope_scaling` in config.json belongs to the full layers only; a windowed layer that is
stretched too differs everywhere.
"""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding, YaRNScaling
from llm_quest.models import olmo2
from llm_quest.models.config_fields import config_dataclass, hf_default, local_rope_field, per_layer, rope_field
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.windows import FULL, SLIDING, layer_pattern, layer_window, require_layer_types

THETA = 500_000.0


@config_dataclass
class Config(olmo2.Config):
    """OLMo 2's numbers. rotary: of the full layers; swa_rotary: of the windowed ones, with sliding_window tokens."""

    rotary: RotaryEmbedding = rope_field(theta=THETA)
    sliding_window: int | None = hf_default(4096, default=4096)
    layer_types: tuple[str, ...] = per_layer(
        FULL, SLIDING, hf_default=lambda c: layer_pattern(c.num_hidden_layers, 4), default=()
    )
    swa_rotary: RotaryEmbedding = local_rope_field("", theta=THETA, default=RotaryEmbedding(128, THETA))

    def __post_init__(self) -> None:
        require_layer_types(self)


def block(config: Config, layer_idx: int) -> Block:
    """OLMo 2's layer; windowed, with the plain rotation, or full."""
    layer: Any = olmo2.block(config, layer_idx)
    attention = layer.mixer.layer
    attention.sliding_window = layer_window(config, layer_idx)
    attention.rotary = config.rotary if config.layer_types[layer_idx] == FULL else config.swa_rotary
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("olmo3", config, block, TokenEmbedding, RMSNorm)


YARN = YaRNScaling(8.0, 8192, explicit_attention_factor=1.2079441541679836)


def olmo3_config(**numbers: Any) -> Config:
    """The published sizes share vocabulary, context, window, pattern and stretch."""
    shared: dict[str, Any] = {"vocab_size": 100_278, "max_position_embeddings": 65_536, "head_dim": 128}
    shared |= {"layer_types": layer_pattern(numbers["num_hidden_layers"], 4), "tie_word_embeddings": False}
    return Config(**(shared | numbers), rotary=RotaryEmbedding(128, THETA, YARN))


TINY = Config(
    97, 48, 3, 4, 2, 12, 64, 128, RotaryEmbedding(12, THETA, YaRNScaling(4.0, 32)), False, sliding_window=5,
    layer_types=(SLIDING, FULL, SLIDING), swa_rotary=RotaryEmbedding(12, THETA),
)  # fmt: skip
PRESETS = preset_table(
    SIZES,
    ("olmo3-7b", "allenai/Olmo-3-1025-7B", 7_298_011_136, 32, 4096, 32, 32, 11_008),
    ("olmo3-32b", "allenai/Olmo-3-1125-32B", 32_233_522_176, 64, 5120, 40, 8, 27_648),
    make=olmo3_config,
    eos=(100_257,),
)

FAMILY = Family(
    name="olmo3",
    Config=Config,
    assemble=assemble,
    weight_map=olmo2.weight_map,
    architectures={"olmo3": "Olmo3ForCausalLM"},
    presets=(*PRESETS, Preset("olmo3-tiny", TINY)),
)
