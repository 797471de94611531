"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671; arXiv:2412.15115). What is new after Llama:

- Queries, keys and values have biases, the output projection none.
- Base 1e6, no stretch; eps 1e-6. Only the small models (up to 3B) tie the output matrix to the embedding.
- Windowed layers are possible: with `use_sliding_window` those from `max_window_layers` on have a window, the first
  ones see everything. (No released model uses it.)

Commonly got wrong: config.json has no field for the biases, and without them the text is fluent nonsense;
`sliding_window` is to be ignored while `use_sliding_window` is false; the windowed layers are the *last* ones.
"""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.linear import Linear
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import (
    config_dataclass,
    constant_field,
    hf_default,
    json_field,
    kv_heads_default,
    per_layer,
)
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import WeightMap, attention_names, decoder_names, expand_layers, swiglu_names
from llm_quest.models.windows import FULL, SLIDING, layer_window, require_layer_types


def default_layer_types(c: Any) -> tuple[str, ...]:
    """Windowed from max_window_layers on, if there is a window."""
    full = c.num_hidden_layers if c.sliding_window is None else c.max_window_layers
    return tuple(FULL if layer < full else SLIDING for layer in range(c.num_hidden_layers))


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, and the window: sliding_window tokens in the layers whose type is sliding_attention."""

    num_key_value_heads: int = kv_heads_default(32)
    max_position_embeddings: int = hf_default(32_768)
    rms_norm_eps: float = 1e-6
    attention_bias: bool = constant_field(default=True)
    mlp_bias: bool = constant_field(default=False)
    use_sliding_window: bool = False
    sliding_window: int | None = json_field(
        lambda c: c.json.get("sliding_window", 4096) if c.use_sliding_window else None, default=None
    )
    max_window_layers: int = hf_default(28, default=28)
    layer_types: tuple[str, ...] = per_layer(FULL, SLIDING, hf_default=default_layer_types, default=())

    def __post_init__(self) -> None:
        require_layer_types(self)


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer with biases, but for the output projection's."""
    layer: Any = llama.block(config, layer_idx)
    attention = layer.mixer.layer
    attention.out = Linear(attention.out.in_features, config.hidden_size, bias=False)
    attention.sliding_window = layer_window(config, layer_idx)
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("qwen2", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings) | attention_names(bias=True, out_bias=False)
    return expand_layers(table | swiglu_names(), config.num_hidden_layers)


def qwen2_config(**numbers: Any) -> Config:
    """The published sizes share base and window rule."""
    layers = numbers["num_hidden_layers"]
    return Config(
        **({"layer_types": (FULL,) * layers} | numbers), rotary=RotaryEmbedding(numbers["head_dim"], 1_000_000.0)
    )


COLUMNS = f"{SIZES} head_dim vocab_size tie_word_embeddings max_position_embeddings"
TINY = qwen2_config(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=True, use_sliding_window=True,
    sliding_window=5, max_window_layers=1, layer_types=(FULL, SLIDING),
)  # fmt: skip
PRESETS = preset_table(
    COLUMNS,
    ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 494_032_768, 24, 896, 14, 2, 4864, 64, 151_936, True, 32_768),
    ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", 1_543_714_304, 28, 1536, 12, 2, 8960, 128, 151_936, True, 131_072),
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B", 3_085_938_688, 36, 2048, 16, 2, 11_008, 128, 151_936, True, 32_768),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B", 7_615_616_512, 28, 3584, 28, 4, 18_944, 128, 152_064, False, 131_072),
    ("qwen2.5-14b", "Qwen/Qwen2.5-14B", 14_770_033_664, 48, 5120, 40, 8, 13_824, 128, 152_064, False, 131_072),
    ("qwen2.5-32b", "Qwen/Qwen2.5-32B", 32_763_876_352, 64, 5120, 40, 8, 27_648, 128, 152_064, False, 131_072),
    ("qwen2.5-72b", "Qwen/Qwen2.5-72B", 72_706_203_648, 80, 8192, 64, 8, 29_568, 128, 152_064, False, 131_072),
    make=qwen2_config,
    eos=(151_643,),
)

FAMILY = Family(
    name="qwen2",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"qwen2": "Qwen2ForCausalLM"},
    presets=(*PRESETS, Preset("qwen2-tiny", TINY)),
)
