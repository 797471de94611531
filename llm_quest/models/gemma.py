"""Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786), text. What is new after Llama:

- Layers alternate between a local window and the whole context (2: one to one; 3: five to one, each kind with its own
  base).
- A norm before *and* after each layer; every norm scales by 1 + weight.
- Embeddings enter the stream times sqrt(hidden_size); the output matrix, though tied, is not scaled.
- GeGLU with the tanh approximation instead of SwiGLU; scores are scaled by a number of their own, not by head_dim.
- Gemma 2 caps attention scores and logits with a soft tanh; Gemma 3 normalizes queries and keys instead.
- Windowed layers keep only their window in the cache.

Commonly got wrong: the published `post_attention_layernorm` stands *behind* attention here, before the MLP in Llama;
the window of W counts the token itself; layer i is global iff (i+1) divides by the pattern, so a stack may end on a
local layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP, gelu_tanh
from llm_quest.layers.linear import LMHead
from llm_quest.layers.norm import ZeroCenteredRMSNorm
from llm_quest.layers.rotary import LinearScaling, RotaryEmbedding
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.config_fields import (
    config_dataclass,
    hf_default,
    json_field,
    local_rope_field,
    per_layer,
    rope_field,
    spelled,
    unwritten,
)
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import Family, SubConfig, preset_table
from llm_quest.models.weight_names import (
    Names,
    attention_names,
    decoder_names,
    expand_layers,
    layer_names,
    swiglu_names,
)
from llm_quest.models.windows import FULL, SLIDING, layer_pattern, layer_window, require_layer_types


def default_layer_types(c: Any) -> tuple[str, ...]:
    """Where config.json has no layer_types: the older spellings of the pattern, else the generation's own."""
    pattern = c.json.get("sliding_window_pattern") or c.json.get("_sliding_window_pattern")
    return layer_pattern(c.num_hidden_layers, pattern or (6 if c.use_qk_norm else 2))


@config_dataclass
class Config:
    """Gemma's numbers, as config.json has them (its text_config leaves fields out and relies on its class's values).
    use_qk_norm: Gemma 3. query_pre_attn_scalar: scores are divided by its root. sliding_window: how many tokens a
    windowed layer sees, itself included. rotary: of the global layers, swa_rotary: of the windowed ones."""

    use_qk_norm: bool = json_field(lambda c: c.json.get("model_type") != "gemma2", unwritten)
    vocab_size: int = hf_default(lambda c: 262_208 if c.use_qk_norm else 256_000)
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int = hf_default(8)
    num_key_value_heads: int = hf_default(4)
    head_dim: int = hf_default(256)
    intermediate_size: int
    max_position_embeddings: int = hf_default(lambda c: 131_072 if c.use_qk_norm else 8192)
    layer_types: tuple[str, ...] = per_layer(FULL, SLIDING, hf_default=default_layer_types)
    sliding_window: int = hf_default(4096)
    query_pre_attn_scalar: float = hf_default(256)
    rotary: RotaryEmbedding = rope_field(theta=lambda c: 1_000_000.0 if c.use_qk_norm else 10_000.0)
    swa_rotary: RotaryEmbedding = local_rope_field("rope_local_base_freq", when=lambda c: c.use_qk_norm)
    attn_logit_softcapping: float | None = hf_default(lambda c: None if c.use_qk_norm else 50.0, default=None)
    final_logit_softcapping: float | None = hf_default(lambda c: None if c.use_qk_norm else 30.0, default=None)
    rms_norm_eps: float = 1e-6
    hidden_activation: Literal["gelu_pytorch_tanh"] = spelled(
        "hidden_activation", "hidden_act", default="gelu_pytorch_tanh"
    )
    attention_bias: Literal[False] = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_layer_types(self)


def block(config: Config, layer_idx: int) -> Block:
    """One layer, local or global: attention, then GeGLU, a norm on either side of each."""
    window = layer_window(config, layer_idx)
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary=config.rotary if window is None else config.swa_rotary,
        sliding_window=window,
        q_norm=ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None,
        k_norm=ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None,
        attend=ScaledDotProduct(config.query_pre_attn_scalar**-0.5, softcap=config.attn_logit_softcapping),
    )
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, gelu_tanh)
    norm, post_norm, ffn_norm, ffn_post_norm = (
        ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(4)
    )
    return Block(
        mixer=Sublayer(norm, attention, post_norm=post_norm),
        feed_forward=Sublayer(ffn_norm, mlp, post_norm=ffn_post_norm),
    )


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    embed = TokenEmbedding(config.vocab_size, config.hidden_size, scale=config.hidden_size**0.5)
    tied, softcap = embed.token if config.tie_word_embeddings else None, config.final_logit_softcapping
    return Decoder(
        ModelSpec("gemma", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps),
        head=LMHead(config.hidden_size, config.vocab_size, tied_embedding=tied, softcap=softcap),
    )


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    norms = layer_names({
        "mixer.post_norm.weight": "post_attention_layernorm.weight",
        "feed_forward.norm.weight": "pre_feedforward_layernorm.weight",
        "feed_forward.post_norm.weight": "post_feedforward_layernorm.weight",
    })  # fmt: skip
    table = (
        decoder_names(tied=config.tie_word_embeddings)
        | attention_names(qk_norm=config.use_qk_norm)
        | swiglu_names()
        | norms
    )
    return expand_layers(table, config.num_hidden_layers)


def gemma2_config(**numbers: Any) -> Config:
    """Gemma 2's sizes share vocabulary, context, window, pattern and caps."""
    shared: dict[str, Any] = {"vocab_size": 256_000, "max_position_embeddings": 8192, "sliding_window": 4096} | numbers
    rotary = RotaryEmbedding(shared["head_dim"], 10_000.0)
    caps: dict[str, Any] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    pattern = {"layer_types": layer_pattern(shared["num_hidden_layers"], 2)}
    return Config(**(caps | pattern | shared), rotary=rotary, swa_rotary=rotary, use_qk_norm=False)


def gemma3_config(*, small: bool, **numbers: Any) -> Config:
    """Gemma 3's sizes share pattern and bases; the small ones (text only) have another vocabulary, context and
    window."""
    vocab_size, max_position_embeddings, window = (262_144, 32_768, 512) if small else (262_208, 131_072, 1024)
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "sliding_window": window,
    }
    shared |= {"layer_types": layer_pattern(numbers["num_hidden_layers"], 6)} | numbers
    rotary = RotaryEmbedding(shared["head_dim"], 1_000_000.0, None if small else LinearScaling(8.0))
    return Config(**shared, rotary=rotary, swa_rotary=RotaryEmbedding(shared["head_dim"], 10_000.0), use_qk_norm=True)


COLUMNS = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    query_pre_attn_scalar"""
TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 256, "query_pre_attn_scalar": 20}
TINY |= {"sliding_window": 5}
GEMMA2_TINY = gemma2_config(
    **TINY, num_hidden_layers=3, layer_types=(SLIDING, FULL, SLIDING), attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
)  # fmt: skip
GEMMA3_TINY = gemma3_config(**TINY, small=False, num_hidden_layers=4, layer_types=(SLIDING, SLIDING, FULL, SLIDING))
TEXT_DEFAULTS = {"vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
"""Of the text within a Gemma 3 with images, which leaves out what its class has."""
EOS_TOKEN_IDS = (1,)
"""Of the base files; those tuned for chats end turns too: 107 of Gemma 2, 106 of Gemma 3."""

FAMILY = Family(
    name="gemma",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"gemma3_text": "Gemma3ForCausalLM", "gemma2": "Gemma2ForCausalLM"},
    choose_model_type=lambda config: "gemma3_text" if config.use_qk_norm else "gemma2",
    classifiers={"gemma3_text": "Gemma3TextForSequenceClassification"},
    parts={"gemma3": SubConfig("text_config", "gemma3_text", TEXT_DEFAULTS)},
    other_parts=("vision_tower.", "multi_modal_projector."),
    presets=(
        *preset_table(
            COLUMNS,
            ("gemma2-2b", "google/gemma-2-2b", 2_614_341_888, 2304, 26, 8, 4, 256, 9216, 256),
            ("gemma2-9b", "google/gemma-2-9b", 9_241_705_984, 3584, 42, 16, 8, 256, 14_336, 256),
            ("gemma2-27b", "google/gemma-2-27b", 27_227_128_320, 4608, 46, 32, 16, 128, 36_864, 144),
            make=gemma2_config,
            eos=EOS_TOKEN_IDS,
        ),
        *preset_table(
            COLUMNS,
            ("gemma3-270m", "google/gemma-3-270m", 268_098_176, 640, 18, 4, 1, 256, 2048, 256),
            ("gemma3-1b", "google/gemma-3-1b-pt", 999_885_952, 1152, 26, 4, 1, 256, 6912, 256),
            make=partial(gemma3_config, small=True),
            eos=EOS_TOKEN_IDS,
        ),
        *preset_table(
            COLUMNS,
            ("gemma3-4b", "google/gemma-3-4b-pt", 3_880_263_168, 2560, 34, 8, 4, 256, 10_240, 256),
            ("gemma3-12b", "google/gemma-3-12b-pt", 11_766_034_176, 3840, 48, 16, 8, 256, 15_360, 256),
            ("gemma3-27b", "google/gemma-3-27b-pt", 27_009_346_304, 5376, 62, 32, 16, 128, 21_504, 168),
            make=partial(gemma3_config, small=False),
            eos=EOS_TOKEN_IDS,
            notes="text; within a multimodal model",
        ),
        Preset("gemma2-tiny", GEMMA2_TINY),
        Preset("gemma3-tiny", GEMMA3_TINY),
    ),
)
