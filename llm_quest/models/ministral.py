"""Ministral (`ministral`) and Ministral 3 (`ministral3`; Mistral AI 2025). What is new after Mistral:

- ministral: a window in some layers and not in others (`layer_types`).
- ministral3: no window; YaRN by a factor of 16 for a context of 262,144, and queries that grow with their position,
  times 1 + 0.1 ln(1 + floor(p / 16,384)), so that attention stays sharp over a long context.

Commonly got wrong: within the first 16,384 positions the factor is 1, so its absence shows in long texts alone; YaRN's
mscale and mscale_all_dim are equal, so cos and sin keep their size. Ministral-8B-Instruct-2410 is published as a
Mistral with a window of 32,768, and right up to that length only.
"""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.attention import PositionQueryScale
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding, YaRNScaling
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, hf_default, json_field, per_layer, rope_field
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.windows import FULL, SLIDING, layer_window, require_layer_types

YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "original_max_position_embeddings": 16_384,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def is_ministral3(c: Any) -> bool:
    return bool(c.json.get("model_type") == "ministral3")


def read_scaling_beta(c: Any) -> float | None:
    """Ministral 3's field within rope_parameters."""
    rope = c.json.get("rope_parameters") or c.json.get("rope_scaling") or YARN
    return rope.get("llama_4_scaling_beta") if is_ministral3(c) else None


@config_dataclass
class Config(llama.Config):
    """Llama's numbers. sliding_window: of the layers whose type is sliding_attention. llama_4_scaling_beta: how fast
    queries grow with their position; None: not at all (ministral)."""

    num_key_value_heads: int = hf_default(8)
    head_dim: int = hf_default(lambda c: 128 if is_ministral3(c) else c.hidden_size // c.num_attention_heads)
    max_position_embeddings: int = hf_default(lambda c: 262_144 if is_ministral3(c) else 131_072)
    rotary: RotaryEmbedding = rope_field(
        extra=lambda c: {} if c.llama_4_scaling_beta is None else {"llama_4_scaling_beta": c.llama_4_scaling_beta},
        rope_scaling=False,
        absent=lambda c: YARN if is_ministral3(c) else {},
    )
    rms_norm_eps: float = hf_default(lambda c: 1e-5 if is_ministral3(c) else 1e-6, default=1e-5)
    sliding_window: int | None = hf_default(lambda c: None if is_ministral3(c) else 4096, default=None)
    layer_types: tuple[str, ...] = per_layer(
        FULL,
        SLIDING,
        hf_default=lambda c: (FULL if c.sliding_window is None else SLIDING,) * c.num_hidden_layers,
        default=(),
    )
    llama_4_scaling_beta: float | None = json_field(read_scaling_beta, lambda beta, config: {}, default=None)

    def __post_init__(self) -> None:
        require_layer_types(self)
        is_alike = isinstance(self.rotary.scaling, YaRNScaling) and len(set(self.layer_types)) == 1
        if self.llama_4_scaling_beta is not None and not is_alike:
            raise ValueError("a ministral3 (llama_4_scaling_beta) has rope_type yarn and layers of one type")


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer, with a window or with queries that grow."""
    layer: Any = llama.block(config, layer_idx)
    attention = layer.mixer.layer
    attention.sliding_window = layer_window(config, layer_idx)
    if config.llama_4_scaling_beta is not None:
        yarn: Any = config.rotary.scaling
        attention.query_scale = PositionQueryScale(config.llama_4_scaling_beta, yarn.original_max_position_embeddings)
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("ministral", config, block, TokenEmbedding, RMSNorm)


def ministral3_config(**numbers: Any) -> Config:
    """The published sizes share vocabulary, heads, stretch and the growth of queries."""
    shared: dict[str, Any] = {"vocab_size": 131_072, "head_dim": 128, "max_position_embeddings": 262_144}
    shared |= {"layer_types": (FULL,) * numbers["num_hidden_layers"], "llama_4_scaling_beta": 0.1} | numbers
    scaling = YaRNScaling(16.0, 16_384, mscale=1.0, mscale_all_dim=1.0)
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 1_000_000.0, scaling))


TINY = Config(
    97, 48, 2, 4, 2, 12, 64, 128, RotaryEmbedding(12, 10_000.0, YaRNScaling(16.0, 4, mscale=1.0, mscale_all_dim=1.0)),
    False, layer_types=(FULL, FULL), llama_4_scaling_beta=0.5,
)  # fmt: skip
PRESETS = preset_table(
    f"{SIZES} tie_word_embeddings",
    ("ministral3-3b", "mistralai/Ministral-3-3B-Base-2512", 3_429_006_336, 26, 3072, 32, 8, 9216, True),
    ("ministral3-8b", "mistralai/Ministral-3-8B-Base-2512", 8_489_553_920, 34, 4096, 32, 8, 14_336, False),
    ("ministral3-14b", "mistralai/Ministral-3-14B-Base-2512", 13_506_073_600, 40, 5120, 32, 8, 16_384, False),
    make=ministral3_config,
    eos=(2,),
    notes="text; within a multimodal model",
)

FAMILY = Family(
    name="ministral",
    Config=Config,
    assemble=assemble,
    weight_map=llama.weight_map,
    architectures={"ministral": "MinistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    choose_model_type=lambda config: "ministral" if config.llama_4_scaling_beta is None else "ministral3",
    other_parts=("vision_tower.", "multi_modal_projector."),
    presets=(*PRESETS, Preset("ministral-tiny", TINY)),
)
