"""SmolLM3 (Bakouch et al. 2025, "SmolLM3: smol, multilingual, long-context reasoner"). What is new after Llama:

- Every fourth layer has no rotary positions at all (NoPE: Yang et al. 2025, arXiv:2501.18795): it sees the order of
  tokens through the causal mask and the other layers alone, which extends better to long contexts.
- Base 5e6 for a context of 65,536; eps 1e-6; the output matrix is tied to the embedding.

Commonly got wrong: in `no_rope_layers` a 1 means that the layer *is* rotated; the base of a file that names none is
2e6; a window, where there is one (`use_sliding_window`), belongs to the layers without rotation.
"""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import NoRotary, RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import (
    config_dataclass,
    hf_default,
    json_field,
    kv_heads_default,
    per_layer,
    rope_field,
)
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family
from llm_quest.models.windows import FULL, SLIDING, layer_window, require_layer_types


def read_no_rope_layers(c: Any) -> tuple[int, ...]:
    """1 for a layer with rotation, 0 for one without; every `no_rope_layer_interval`-th has none unless listed."""
    interval = c.json.get("no_rope_layer_interval") or 4
    listed = c.json.get("no_rope_layers")
    return tuple(rotary_layers(c.num_hidden_layers, interval) if listed is None else listed)


def rotary_layers(num_hidden_layers: int, interval: int = 4) -> tuple[int, ...]:
    """1 for every layer but each `interval`-th."""
    return tuple(int((layer + 1) % interval != 0) for layer in range(num_hidden_layers))


def default_layer_types(c: Any) -> tuple[str, ...]:
    """A window, if there is one, in the layers without rotation."""
    return tuple(FULL if rotated or c.sliding_window is None else SLIDING for rotated in c.no_rope_layers)


@config_dataclass
class Config(llama.Config):
    """Llama's numbers; no_rope_layers: 1 for each layer with rotary positions, 0 for one without; sliding_window: of
    the layers whose type is sliding_attention."""

    num_key_value_heads: int = kv_heads_default(4)
    max_position_embeddings: int = hf_default(32_768)
    rotary: RotaryEmbedding = rope_field(theta=2_000_000.0)
    tie_word_embeddings: bool = hf_default(True)
    rms_norm_eps: float = 1e-6
    no_rope_layers: tuple[int, ...] = json_field(read_no_rope_layers, default=(), per_layer=(0, 1))
    use_sliding_window: bool = False
    sliding_window: int | None = json_field(
        lambda c: c.json.get("sliding_window") if c.use_sliding_window else None, default=None
    )
    layer_types: tuple[str, ...] = per_layer(FULL, SLIDING, hf_default=default_layer_types, default=())

    def __post_init__(self) -> None:
        require_layer_types(self)
        if len(self.no_rope_layers) != self.num_hidden_layers or not set(self.no_rope_layers) <= {0, 1}:
            raise ValueError(
                f"no_rope_layers is {list(self.no_rope_layers)}; a 0 or a 1 for each of the {self.num_hidden_layers} "
                "layers is needed"
            )


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer, in every fourth place without rotary positions."""
    layer: Any = llama.block(config, layer_idx)
    attention = layer.mixer.layer
    attention.sliding_window = layer_window(config, layer_idx)
    if not config.no_rope_layers[layer_idx]:
        attention.rotary = NoRotary()
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("smollm3", config, block, TokenEmbedding, RMSNorm)


SMOLLM3 = Config(
    128_256, 2048, 36, 16, 4, 128, 11_008, 65_536, RotaryEmbedding(128, 5_000_000.0), True,
    no_rope_layers=rotary_layers(36), layer_types=(FULL,) * 36,
)  # fmt: skip
TINY = Config(
    97, 48, 3, 4, 2, 12, 64, 128, RotaryEmbedding(12, 10_000.0), True, no_rope_layers=(1, 0, 1),
    use_sliding_window=True, sliding_window=5, layer_types=(FULL, SLIDING, FULL),
)  # fmt: skip

FAMILY = Family(
    name="smollm3",
    Config=Config,
    assemble=assemble,
    weight_map=llama.weight_map,
    architectures={"smollm3": "SmolLM3ForCausalLM"},
    presets=(
        Preset("smollm3-3b", SMOLLM3, 3_075_098_624, "HuggingFaceTB/SmolLM3-3B", eos_token_ids=(128_012,)),
        Preset("smollm3-tiny", TINY),
    ),
)
