"""Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786), text. What is new after Llama:

- Layers alternate between a local window and the whole context (2: one to one; 3: five to one, each kind with its own
  base).
- A norm before *and* after each layer; every norm scales by 1 + weight.
- Embeddings enter the stream times sqrt(width); the output matrix, though tied, is not scaled.
- GeGLU with the tanh approximation instead of SwiGLU; scores are scaled by a number of their own, not by the head's
  width.
- Gemma 2 caps attention scores and logits with a soft tanh; Gemma 3 normalises queries and keys instead.
- Windowed layers keep only their window in the cache.

Commonly got wrong: the published `post_attention_layernorm` stands *behind* attention here, before the MLP in Llama;
the window of W counts the token itself; layer i is global iff (i+1) divides by the pattern, so a stack may end on a
local layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP, gelu_tanh
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.lm_head import LMHead
from llm_quest.layers.norm import ZeroCenteredRMSNorm
from llm_quest.layers.rotary import LinearScaling, RotaryEmbedding
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import (
    ConcatRows,
    Family,
    PublishedWeight,
    WeightMap,
    expand_layers,
    publish_rotary,
    read_per_layer,
    read_rotary,
    read_window,
    require_field,
    require_value,
)


@dataclass(frozen=True)
class Config:
    """Gemma's numbers. sliding_windows: per layer, how far it looks back; None: everything. query_pre_attn_scalar:
    scores are divided by its root. rotary: of the global layers, local_rotary: of the windowed ones.
    attn_logit_softcapping, final_logit_softcapping: None in Gemma 3, whose qk_norm is True."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]
    query_pre_attn_scalar: float
    rotary: RotaryEmbedding
    swa_rotary: RotaryEmbedding
    use_qk_norm: bool
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6

    @property
    def num_hidden_layers(self) -> int:
        return len(self.sliding_windows)


def block(config: Config, layer_idx: int) -> Block:
    """One layer, local or global: attention, then GeGLU, a norm on either side of each."""
    window = config.sliding_windows[layer_idx]
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
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab_size, config.hidden_size, scale=config.hidden_size**0.5)
    return Decoder(
        ModelSpec("gemma", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps),
        head=LMHead(
            config.hidden_size, config.vocab_size, tied_embedding=embed.token, softcap=config.final_logit_softcapping
        ),
    )


def names(config: Config) -> WeightMap:
    """Our parameters and their published names."""
    layer = "model.layers.{i}."
    table: dict[str, PublishedWeight] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": ConcatRows(*(f"{layer}self_attn.{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{layer}self_attn.o_proj.weight",
        "blocks.{i}.mixer.post_norm.weight": f"{layer}post_attention_layernorm.weight",
        "blocks.{i}.feed_forward.norm.weight": f"{layer}pre_feedforward_layernorm.weight",
        "blocks.{i}.feed_forward.layer.gate_up.weight": ConcatRows(
            f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"
        ),
        "blocks.{i}.feed_forward.layer.down.weight": f"{layer}mlp.down_proj.weight",
        "blocks.{i}.feed_forward.post_norm.weight": f"{layer}post_feedforward_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    if config.use_qk_norm:
        table["blocks.{i}.mixer.layer.q_norm.weight"] = f"{layer}self_attn.q_norm.weight"
        table["blocks.{i}.mixer.layer.k_norm.weight"] = f"{layer}self_attn.k_norm.weight"
    return expand_layers(table, config.num_hidden_layers)


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json. The `text_config` of Gemma 3's multimodal files leaves fields out and relies on
    its class's values."""
    is_gemma3 = hf_config.get("model_type") != "gemma2"
    hf_config = {name: value for name, value in hf_config.items() if value is not None}
    require_value(
        {"activation": hf_config.get("hidden_activation") or hf_config.get("hidden_act")},
        "activation",
        None,
        "gelu_pytorch_tanh",
    )
    require_value(hf_config, "attention_bias", False)
    layers, pattern = require_field(hf_config, "num_hidden_layers"), 6 if is_gemma3 else 2
    pattern = hf_config.get("sliding_window_pattern") or hf_config.get("_sliding_window_pattern") or pattern
    layer_types = read_per_layer(hf_config, "layer_types", layers, "full_attention", "sliding_attention") or [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
    ]
    window, head_dim = read_window(hf_config, "sliding_window", 4096), hf_config.get("head_dim", 256)
    local = rope_parameters_of(hf_config, "sliding_attention") | {"rope_scaling": None} if is_gemma3 else hf_config
    if is_gemma3 and "rope_theta" not in (local.get("rope_parameters") or {}):
        local = {"rope_theta": hf_config.get("rope_local_base_freq", 10_000.0)}
    return Config(
        vocab_size=hf_config.get("vocab_size", 262_208 if is_gemma3 else 256_000),
        hidden_size=require_field(hf_config, "hidden_size"),
        num_attention_heads=hf_config.get("num_attention_heads", 8),
        num_key_value_heads=hf_config.get("num_key_value_heads", 4),
        head_dim=head_dim,
        intermediate_size=require_field(hf_config, "intermediate_size"),
        max_position_embeddings=hf_config.get("max_position_embeddings", 131_072 if is_gemma3 else 8192),
        sliding_windows=tuple(None if kind == "full_attention" else window for kind in layer_types),
        query_pre_attn_scalar=float(hf_config.get("query_pre_attn_scalar", 256)),
        rotary=read_rotary(
            rope_parameters_of(hf_config, "full_attention"), head_dim, 1_000_000.0 if is_gemma3 else 10_000.0
        ),
        swa_rotary=read_rotary(local, head_dim),
        use_qk_norm=is_gemma3,
        attn_logit_softcapping=None if is_gemma3 else hf_config.get("attn_logit_softcapping"),
        final_logit_softcapping=hf_config.get("final_logit_softcapping"),
        rms_norm_eps=hf_config.get("rms_norm_eps", 1e-6),
    )


def rope_parameters_of(hf_config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The config with `rope_parameters` of one kind of layer, where they are given per kind."""
    rope = hf_config.get("rope_parameters") or {}
    return {**hf_config, "rope_parameters": rope[kind]} if kind in rope else dict(hf_config)


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    windows = [window for window in config.sliding_windows if window is not None]
    layer_types = ["full_attention" if window is None else "sliding_attention" for window in config.sliding_windows]
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_types": layer_types,
        "sliding_window": windows[0] if windows else config.max_position_embeddings,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar)
        if config.query_pre_attn_scalar == int(config.query_pre_attn_scalar)
        else config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "tie_word_embeddings": True,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    rope, local = publish_rotary(config.rotary), publish_rotary(config.swa_rotary)
    if not config.use_qk_norm:
        return {**shared, **rope, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    per_kind = {"full_attention": rope["rope_parameters"], "sliding_attention": local["rope_parameters"]}
    return {**shared, **rope, "rope_parameters": per_kind, "rope_local_base_freq": local["rope_theta"]}


def gemma2_config(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    intermediate_size: int,
    query_pre_attn_scalar: float,
) -> Config:
    """Gemma 2's sizes share vocabulary, context, window, pattern and caps."""
    rotary, windows = (
        RotaryEmbedding(head_dim, 10_000.0),
        tuple(4096 if i % 2 == 0 else None for i in range(num_hidden_layers)),
    )
    sizes = (256_000, hidden_size, num_attention_heads, num_key_value_heads, head_dim, intermediate_size, 8192)
    return Config(
        *sizes,
        windows,
        query_pre_attn_scalar,
        rotary,
        rotary,
        use_qk_norm=False,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )


def gemma3_config(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    intermediate_size: int,
    *,
    small: bool,
    query_pre_attn_scalar: float = 256,
) -> Config:
    """Gemma 3's sizes share pattern and bases; the small ones (text only) have another vocabulary, context and
    window."""
    vocab_size, max_position_embeddings, window = (262_144, 32_768, 512) if small else (262_208, 131_072, 1024)
    windows = tuple(None if (i + 1) % 6 == 0 else window for i in range(num_hidden_layers))
    rotary = RotaryEmbedding(head_dim, 1_000_000.0, None if small else LinearScaling(8.0))
    sizes = (
        vocab_size,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        intermediate_size,
        max_position_embeddings,
    )
    return Config(*sizes, windows, query_pre_attn_scalar, rotary, RotaryEmbedding(head_dim, 10_000.0), use_qk_norm=True)


EOS_TOKEN_IDS = (1,)
"""Of the base files; those tuned for chats end turns too: 107 of Gemma 2, 106 of Gemma 3."""
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "query_pre_attn_scalar": 20.0,
}

MULTIMODAL = "text; within a multimodal model"
FAMILY = Family(
    name="gemma",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=init_depth_scaled_,
    names=names,
    read=read,
    publish=publish,
    extra_model_types=("gemma2",),
    presets=(
        Preset(
            "gemma2-2b",
            gemma2_config(2304, 26, 8, 4, 256, 9216, 256),
            2_614_341_888,
            "google/gemma-2-2b",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "gemma2-9b",
            gemma2_config(3584, 42, 16, 8, 256, 14336, 256),
            9_241_705_984,
            "google/gemma-2-9b",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "gemma2-27b",
            gemma2_config(4608, 46, 32, 16, 128, 36864, 144),
            27_227_128_320,
            "google/gemma-2-27b",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "gemma3-270m",
            gemma3_config(640, 18, 4, 1, 256, 2048, small=True),
            268_098_176,
            "google/gemma-3-270m",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "gemma3-1b",
            gemma3_config(1152, 26, 4, 1, 256, 6912, small=True),
            999_885_952,
            "google/gemma-3-1b-pt",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "gemma3-4b",
            gemma3_config(2560, 34, 8, 4, 256, 10240, small=False),
            3_880_263_168,
            "google/gemma-3-4b-pt",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "gemma3-12b",
            gemma3_config(3840, 48, 16, 8, 256, 15360, small=False),
            11_766_034_176,
            "google/gemma-3-12b-pt",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "gemma3-27b",
            gemma3_config(5376, 62, 32, 16, 128, 21504, small=False, query_pre_attn_scalar=168),
            27_009_346_304,
            "google/gemma-3-27b-pt",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "gemma2-tiny",
            Config(
                **TINY,
                sliding_windows=(5, None, 5),
                rotary=RotaryEmbedding(16, 10_000.0),
                swa_rotary=RotaryEmbedding(16, 10_000.0),
                use_qk_norm=False,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            ),
        ),
        Preset(
            "gemma3-tiny",
            Config(
                **TINY,
                sliding_windows=(5, 5, None, 5),
                rotary=RotaryEmbedding(16, 1_000_000.0, LinearScaling(8.0)),
                swa_rotary=RotaryEmbedding(16, 10_000.0),
                use_qk_norm=True,
            ),
        ),
    ),
)
