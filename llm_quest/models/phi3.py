"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024, arXiv:2404.14219, arXiv:2412.08905). What is new after Llama:

- The files hold one matrix for queries, keys and values, and one for gate and up, which is how they are computed here
  anyway.
- The long-context models stretch positions with LongRoPE: a divisor for every pair, and two lists of them.
- Phi-3-mini with a context of 4,096 has a window of 2047; Phi-4-mini rotates three quarters of each head.

Commonly got wrong: the fused rows are q, k, v and gate, up, in this order; with LongRoPE cos and sin are multiplied by
1.19 (128k) also in short texts; `original_max_position_embeddings` stands outside the rope's own fields.
"""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import LongRoPEScaling, RotaryEmbedding
from llm_quest.models import llama, mistral
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default, rope_field
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import WeightMap, decoder_names, expand_layers, layer_names


@config_dataclass
class Config(llama.Config):
    """Llama's numbers; sliding_window: how many tokens a layer sees, itself included; None: all.
    original_max_position_embeddings: the length that LongRoPE stretches from."""

    max_position_embeddings: int = hf_default(4096)
    rotary: RotaryEmbedding = rope_field(partial=1.0, original=4096)
    rms_norm_eps: float = 1e-5
    attention_bias: bool = constant_field(default=False)
    mlp_bias: bool = constant_field(default=False)
    sliding_window: int | None = None
    original_max_position_embeddings: int = hf_default(4096, default=4096)

    def __post_init__(self) -> None:
        if not isinstance(self.rotary.scaling, LongRoPEScaling | None):
            raise ValueError(
                f"the rotation is scaled by {type(self.rotary.scaling).__name__}; a phi3 has longrope or no scaling: "
                "transformers reads no other"
            )


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer, with a window."""
    return mistral.block(config, layer_idx)  # type: ignore[arg-type]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("phi3", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names, of fused matrices."""
    return expand_layers(decoder_names(tied=config.tie_word_embeddings) | layer_names(FUSED), config.num_hidden_layers)


FUSED = {
    "mixer.layer.qkv.weight": "self_attn.qkv_proj.weight",
    "mixer.layer.out.weight": "self_attn.o_proj.weight",
    "feed_forward.layer.gate_up.weight": "mlp.gate_up_proj.weight",
    "feed_forward.layer.down.weight": "mlp.down_proj.weight",
}


def phi3_config(rope_theta: float = 10_000.0, partial: float = 1.0, **numbers: Any) -> Config:
    """The published sizes, without LongRoPE's lists, which only a folder has."""
    shared = {"tie_word_embeddings": False, "max_position_embeddings": 4096} | numbers
    return Config(**shared, rotary=RotaryEmbedding(int(numbers["head_dim"] * partial), rope_theta))


COLUMNS = f"{SIZES} head_dim vocab_size max_position_embeddings rope_theta sliding_window"
LONG = LongRoPEScaling(4.0, 64, short_factor=(1.0, 1.1, 1.3, 1.6), long_factor=(1.0, 1.7, 2.9, 4.0))
TINY = Config(
    97, 48, 2, 4, 2, 12, 64, 256, RotaryEmbedding(8, 10_000.0, LONG), False, sliding_window=7,
    original_max_position_embeddings=64,
)  # fmt: skip
PRESETS = preset_table(
    COLUMNS,
    (
        "phi3-mini-4k", "microsoft/Phi-3-mini-4k-instruct", 3_821_079_552,
        32, 3072, 32, 32, 8192, 96, 32_064, 4096, 10_000.0, 2047,
    ),
    (
        "phi3-medium-4k", "microsoft/Phi-3-medium-4k-instruct", 13_960_238_080,
        40, 5120, 40, 10, 17_920, 128, 32_064, 4096, 10_000.0, 2047,
    ),
    ("phi4", "microsoft/phi-4", 14_659_507_200, 40, 5120, 40, 10, 17_920, 128, 100_352, 16_384, 250_000.0, None),
    make=phi3_config,
)  # fmt: skip

FAMILY = Family(
    name="phi3",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"phi3": "Phi3ForCausalLM"},
    presets=(*PRESETS, Preset("phi3-tiny", TINY)),
)
