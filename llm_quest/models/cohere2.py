"""Command R7B, Command A and Tiny Aya (Cohere2; Cohere 2025, arXiv:2504.00698). What is new after Llama:

- Attention and feed-forward layer read the same normalized x and are added at once: x + attention(y) + mlp(y).
- LayerNorm without bias (the mean is subtracted) instead of RMSNorm.
- Three layers of four have a window of 4096 and rotary positions; the fourth sees everything and has no positions at
  all. The rotated pairs are neighbors.
- Logits are multiplied by logit_scale; the output matrix is the embedding.

Commonly got wrong: a layer has one norm; layers without a window are not rotated; pairs (2i, 2i+1) are, not halves.
"""

from __future__ import annotations

from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import ParallelLayers, SingleBlock, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import LayerNorm, ScaledNorm
from llm_quest.layers.rotary import NoRotary, RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import (
    config_dataclass,
    constant_field,
    hf_default,
    json_field,
    per_layer,
    rope_field,
    spelled,
)
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import (
    Names,
    attention_names,
    decoder_names,
    expand_layers,
    parallel_names,
    swiglu_names,
)
from llm_quest.models.windows import FULL, SLIDING, layer_pattern, layer_window, require_layer_types


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, as Cohere2's config.json has them. rms_norm_eps: LayerNorm's; sliding_window: of the layers
    whose type is sliding_attention; logit_scale multiplies the logits."""

    head_dim: int = json_field(lambda c: c.hidden_size // c.num_attention_heads)
    max_position_embeddings: int = hf_default(8192)
    rotary: RotaryEmbedding = rope_field(interleaved=True)
    tie_word_embeddings: bool = hf_default(True)
    rms_norm_eps: float = spelled("layer_norm_eps", default=1e-5)
    mlp_bias: bool = constant_field(default=False)
    logit_scale: float = hf_default(0.0625, default=0.25)
    sliding_window: int | None = hf_default(4096, default=4096)
    layer_types: tuple[str, ...] = per_layer(
        FULL,
        SLIDING,
        hf_default=lambda c: layer_pattern(c.num_hidden_layers, c.json.get("sliding_window_pattern") or 4),
        default=(),
    )

    def __post_init__(self) -> None:
        require_layer_types(self)


def block(config: Config, layer_idx: int) -> SingleBlock:
    """Llama's layers in parallel behind one norm; windowed and rotated, or neither."""
    layer: Any = llama.block(config, layer_idx)
    attention = layer.mixer.layer
    attention.sliding_window = layer_window(config, layer_idx)
    if attention.sliding_window is None:
        attention.rotary = NoRotary()
    layers = ParallelLayers(attention, layer.feed_forward.layer)
    return SingleBlock(Sublayer(LayerNorm(config.hidden_size, config.rms_norm_eps, bias=False), layers))


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""

    def final_norm(dim: int, eps: float) -> ScaledNorm:
        return ScaledNorm(LayerNorm(dim, eps, bias=False), config.logit_scale)

    return decoder_of_blocks("cohere2", config, block, TokenEmbedding, final_norm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings)
    table |= attention_names(bias=config.attention_bias) | swiglu_names()
    table["norm.base.weight"] = table.pop("norm.weight")
    return expand_layers(parallel_names(table, one_norm=True), config.num_hidden_layers)


def cohere2_config(**numbers: Any) -> Config:
    """The published sizes share head_dim, base, window and pattern."""
    shared: dict[str, Any] = {"vocab_size": 256_000, "max_position_embeddings": 132_096, "head_dim": 128}
    shared |= {"tie_word_embeddings": True, "layer_types": layer_pattern(numbers["num_hidden_layers"], 4)} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 50_000.0, interleaved=True))


TINY = cohere2_config(
    vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    intermediate_size=64, max_position_embeddings=128, sliding_window=5, layer_types=(SLIDING, FULL, SLIDING),
)  # fmt: skip
PRESETS = preset_table(
    SIZES,
    ("command-r7b", "CohereLabs/c4ai-command-r7b-12-2024", 8_028_033_024, 32, 4096, 32, 8, 14_336),
    ("command-a", "CohereLabs/c4ai-command-a-03-2025", 111_057_580_032, 64, 12_288, 96, 8, 36_864),
    make=cohere2_config,
    eos=(255_001,),
)
COLUMNS = f"{SIZES} vocab_size max_position_embeddings logit_scale"
TINY_AYA = ("tiny-aya", "CohereLabs/tiny-aya-base", 3_349_227_520, 36, 2048, 16, 4, 11_008, 262_144, 500_000, 1.0)

FAMILY = Family(
    name="cohere2",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"cohere2": "Cohere2ForCausalLM"},
    classifiers={"cohere2": None},
    presets=(*PRESETS, *preset_table(COLUMNS, TINY_AYA, make=cohere2_config, eos=(3,)), Preset("cohere2-tiny", TINY)),
)
