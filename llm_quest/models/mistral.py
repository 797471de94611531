"""Mistral (Jiang et al. 2023, "Mistral 7B", arXiv:2310.06825). What is new after Llama:

- A sliding window: a layer sees the last 4096 tokens, itself included, and the cache keeps no more; over 32 layers
  information still travels 131,072 tokens. (Version 0.1; from 0.2 on there is none.)
- Base 10,000 without a stretch (version 0.3: 1,000,000); heads untied from the embedding.

Commonly got wrong: a window of W counts the token itself; no `sliding_window` in config.json means 4096, null none."""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, hf_default
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family, SubConfig


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, and sliding_window: how many tokens a layer sees, itself included; None: all."""

    num_key_value_heads: int = hf_default(8)
    max_position_embeddings: int = hf_default(131_072)
    sliding_window: int | None = hf_default(4096, default=None)


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer, with a window."""
    layer: Any = llama.block(config, layer_idx)
    layer.mixer.layer.sliding_window = config.sliding_window
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("mistral", config, block, TokenEmbedding, RMSNorm)


V1 = Config(32_000, 4096, 32, 32, 8, 128, 14_336, 32_768, RotaryEmbedding(128, 10_000.0), False, sliding_window=4096)
V3 = Config(32_768, 4096, 32, 32, 8, 128, 14_336, 32_768, RotaryEmbedding(128, 1_000_000.0), False)
FAMILY = Family(
    name="mistral",
    Config=Config,
    assemble=assemble,
    weight_map=llama.weight_map,
    architectures={"mistral": "MistralForCausalLM"},
    parts={"mistral3": SubConfig("text_config", "mistral")},
    other_parts=("vision_tower.", "multi_modal_projector."),
    presets=(
        Preset("mistral-7b-v0.1", V1, 7_241_732_096, "mistralai/Mistral-7B-v0.1", eos_token_ids=(2,)),
        Preset("mistral-7b-v0.3", V3, 7_248_023_552, "mistralai/Mistral-7B-v0.3", eos_token_ids=(2,)),
        Preset("mistral-tiny", Config(97, 48, 2, 4, 2, 16, 96, 256, RotaryEmbedding(16, 1e4), False, sliding_window=5)),
    ),
)
