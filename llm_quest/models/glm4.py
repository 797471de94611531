"""GLM-4 (GLM Team 2024, arXiv:2406.12793), as `glm` and, with two more norms, as `glm4`. What is new after Llama:

- Rotary positions on the first half of each head, and the pairs are neighbors.
- Biases on queries, keys and values in the 9B models; the output projection has none.
- The files hold one matrix for gate and up.
- GLM-4-0414 (`glm4`) normalizes each layer's output too, before it is added.

Commonly got wrong: `post_attention_layernorm` is the norm before the MLP here, as in Llama, although Gemma 2 and OLMo 2
use that name for the norm behind attention; a file without eps means 1.5625e-7.
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
    rope_field,
    unwritten,
)
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import Names, attention_names, decoder_names, expand_layers, layer_names


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, as GLM-4's config.json has them. use_post_norms: model_type glm4, norms behind the layers too.
    attention_bias: of queries, keys and values."""

    num_key_value_heads: int = hf_default(2)
    head_dim: int = hf_default(128)
    max_position_embeddings: int = hf_default(131_072)
    rotary: RotaryEmbedding = rope_field(partial=0.5, interleaved=True)
    rms_norm_eps: float = hf_default(1.5625e-7, default=1e-5)
    attention_bias: bool = hf_default(True, default=True)
    mlp_bias: bool = constant_field(default=False)
    use_post_norms: bool = json_field(lambda c: c.json.get("model_type") != "glm", unwritten, default=True)


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer without a bias on the output projection; in glm4 a norm behind each sublayer too."""
    layer: Any = llama.block(config, layer_idx)
    attention = layer.mixer.layer
    attention.out = Linear(attention.out.in_features, config.hidden_size, bias=False)
    if config.use_post_norms:
        for sublayer in layer.sublayers:
            sublayer.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("glm4", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings)
    table |= attention_names(bias=config.attention_bias, out_bias=False) | layer_names(MLP_NAMES)
    table |= layer_names(POST_NORMS) if config.use_post_norms else {}
    return expand_layers(table, config.num_hidden_layers)


MLP_NAMES = {
    "feed_forward.layer.gate_up.weight": "mlp.gate_up_proj.weight",
    "feed_forward.layer.down.weight": "mlp.down_proj.weight",
}
POST_NORMS = {
    "mixer.post_norm.weight": "post_self_attn_layernorm.weight",
    "feed_forward.post_norm.weight": "post_mlp_layernorm.weight",
}


def glm4_config(**numbers: Any) -> Config:
    """The published sizes share vocabulary, head_dim and base."""
    shared: dict[str, Any] = {"vocab_size": 151_552, "max_position_embeddings": 32_768, "head_dim": 128}
    shared |= {"tie_word_embeddings": False} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"] // 2, 10_000.0, interleaved=True))


TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
PRESETS = preset_table(
    f"{SIZES} attention_bias use_post_norms max_position_embeddings",
    ("glm4-9b", "zai-org/GLM-4-9B-0414", 9_400_279_040, 40, 4096, 32, 2, 13_696, True, True, 32_768),
    ("glm4-32b", "zai-org/GLM-4-32B-0414", 33_141_749_760, 61, 6144, 48, 8, 23_040, False, True, 32_768),
    ("glm-4-9b-hf", "zai-org/glm-4-9b-hf", 9_399_951_360, 40, 4096, 32, 2, 13_696, True, False, 8192),
    make=glm4_config,
    eos=(151_329, 151_336, 151_338),
)

FAMILY = Family(
    name="glm4",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"glm4": "Glm4ForCausalLM", "glm": "GlmForCausalLM"},
    choose_model_type=lambda config: "glm4" if config.use_post_norms else "glm",
    presets=(*PRESETS, Preset("glm4-tiny", glm4_config(**TINY))),
)
