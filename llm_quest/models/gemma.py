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

from llm_quest.contracts import Card, Preset
from llm_quest.layers.attention import GroupedQueryAttention, capped, fused_attention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP, gelu_tanh
from llm_quest.layers.head import Unembed
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.norm import OffsetRMSNorm
from llm_quest.layers.rotary import Linear, Rotary
from llm_quest.models.decoder import Decoder
from llm_quest.models.page import (
    Names,
    Page,
    Published,
    Rows,
    each_layer,
    need,
    only,
    per_layer,
    publish_rotary,
    read_rotary,
    window_of,
)


@dataclass(frozen=True)
class Config:
    """Gemma's numbers. windows: per layer, how far it looks back; None: everything. scalar: scores are divided by its
    root. rotary: of the global layers, local_rotary: of the windowed ones. attention_cap, final_cap: None in Gemma 3,
    whose qk_norm is True."""

    vocab: int
    width: int
    heads: int
    groups: int
    head_width: int
    hidden: int
    context: int
    windows: tuple[int | None, ...]
    scalar: float
    rotary: Rotary
    local_rotary: Rotary
    qk_norm: bool
    attention_cap: float | None = None
    final_cap: float | None = None
    eps: float = 1e-6

    @property
    def layers(self) -> int:
        return len(self.windows)


def block(config: Config, layer: int) -> Block:
    """One layer, local or global: attention, then GeGLU, a norm on either side of each."""
    window = config.windows[layer]
    attention = GroupedQueryAttention(
        config.width,
        heads=config.heads,
        groups=config.groups,
        head_width=config.head_width,
        rotary=config.rotary if window is None else config.local_rotary,
        window=window,
        q_norm=OffsetRMSNorm(config.head_width, config.eps) if config.qk_norm else None,
        k_norm=OffsetRMSNorm(config.head_width, config.eps) if config.qk_norm else None,
        scale=config.scalar**-0.5,
        attend=fused_attention if config.attention_cap is None else capped(config.attention_cap),
    )
    mlp = GatedMLP(config.width, config.hidden, gelu_tanh)
    norm, post_norm, ffn_norm, ffn_post_norm = (OffsetRMSNorm(config.width, config.eps) for _ in range(4))
    return Block(
        mixer=Sublayer(norm, attention, post_norm=post_norm),
        ffn=Sublayer(ffn_norm, mlp, post_norm=ffn_post_norm),
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab, config.width, scale=config.width**0.5)
    return Decoder(
        Card("gemma", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=OffsetRMSNorm(config.width, config.eps),
        head=Unembed(config.width, config.vocab, tied=embed.token, cap=config.final_cap),
    )


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    layer = "model.layers.{i}."
    table: dict[str, Published] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": Rows(*(f"{layer}self_attn.{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{layer}self_attn.o_proj.weight",
        "blocks.{i}.mixer.post_norm.weight": f"{layer}post_attention_layernorm.weight",
        "blocks.{i}.ffn.norm.weight": f"{layer}pre_feedforward_layernorm.weight",
        "blocks.{i}.ffn.layer.gate_up.weight": Rows(f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
        "blocks.{i}.ffn.layer.down.weight": f"{layer}mlp.down_proj.weight",
        "blocks.{i}.ffn.post_norm.weight": f"{layer}post_feedforward_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    if config.qk_norm:
        table["blocks.{i}.mixer.layer.q_norm.weight"] = f"{layer}self_attn.q_norm.weight"
        table["blocks.{i}.mixer.layer.k_norm.weight"] = f"{layer}self_attn.k_norm.weight"
    return per_layer(table, config.layers)


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json. The `text_config` of Gemma 3's multimodal files leaves fields out and relies on
    its class's values."""
    three = published.get("model_type") != "gemma2"
    published = {name: value for name, value in published.items() if value is not None}
    only(
        {"activation": published.get("hidden_activation") or published.get("hidden_act")},
        "activation",
        None,
        "gelu_pytorch_tanh",
    )
    only(published, "attention_bias", False)
    layers, pattern = need(published, "num_hidden_layers"), 6 if three else 2
    pattern = published.get("sliding_window_pattern") or published.get("_sliding_window_pattern") or pattern
    kinds = each_layer(published, "layer_types", layers, "full_attention", "sliding_attention") or [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
    ]
    window, head_width = window_of(published, "sliding_window", 4096), published.get("head_dim", 256)
    local = nested(published, "sliding_attention") | {"rope_scaling": None} if three else published
    if three and "rope_theta" not in (local.get("rope_parameters") or {}):
        local = {"rope_theta": published.get("rope_local_base_freq", 10_000.0)}
    return Config(
        vocab=published.get("vocab_size", 262_208 if three else 256_000),
        width=need(published, "hidden_size"),
        heads=published.get("num_attention_heads", 8),
        groups=published.get("num_key_value_heads", 4),
        head_width=head_width,
        hidden=need(published, "intermediate_size"),
        context=published.get("max_position_embeddings", 131_072 if three else 8192),
        windows=tuple(None if kind == "full_attention" else window for kind in kinds),
        scalar=float(published.get("query_pre_attn_scalar", 256)),
        rotary=read_rotary(nested(published, "full_attention"), head_width, 1_000_000.0 if three else 10_000.0),
        local_rotary=read_rotary(local, head_width),
        qk_norm=three,
        attention_cap=None if three else published.get("attn_logit_softcapping"),
        final_cap=published.get("final_logit_softcapping"),
        eps=published.get("rms_norm_eps", 1e-6),
    )


def nested(published: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The config with `rope_parameters` of one kind of layer, where they are given per kind."""
    rope = published.get("rope_parameters") or {}
    return {**published, "rope_parameters": rope[kind]} if kind in rope else dict(published)


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    windows = [window for window in config.windows if window is not None]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    shared = {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "layer_types": kinds,
        "sliding_window": windows[0] if windows else config.context,
        "query_pre_attn_scalar": int(config.scalar) if config.scalar == int(config.scalar) else config.scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.final_cap,
        "tie_word_embeddings": True,
        "rms_norm_eps": config.eps,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    rope, local = publish_rotary(config.rotary), publish_rotary(config.local_rotary)
    if not config.qk_norm:
        return {**shared, **rope, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    per_kind = {"full_attention": rope["rope_parameters"], "sliding_attention": local["rope_parameters"]}
    return {**shared, **rope, "rope_parameters": per_kind, "rope_local_base_freq": local["rope_theta"]}


def sized2(width: int, layers: int, heads: int, groups: int, head_width: int, hidden: int, scalar: float) -> Config:
    """Gemma 2's sizes share vocabulary, context, window, pattern and caps."""
    rotary, windows = Rotary(head_width, 10_000.0), tuple(4096 if i % 2 == 0 else None for i in range(layers))
    sizes = (256_000, width, heads, groups, head_width, hidden, 8192)
    return Config(*sizes, windows, scalar, rotary, rotary, qk_norm=False, attention_cap=50.0, final_cap=30.0)


def sized3(
    width: int, layers: int, heads: int, groups: int, head_width: int, hidden: int, *, small: bool, scalar: float = 256
) -> Config:
    """Gemma 3's sizes share pattern and bases; the small ones (text only) have another vocabulary, context and
    window."""
    vocab, context, window = (262_144, 32_768, 512) if small else (262_208, 131_072, 1024)
    windows = tuple(None if (i + 1) % 6 == 0 else window for i in range(layers))
    rotary = Rotary(head_width, 1_000_000.0, None if small else Linear(8.0))
    sizes = (vocab, width, heads, groups, head_width, hidden, context)
    return Config(*sizes, windows, scalar, rotary, Rotary(head_width, 10_000.0), qk_norm=True)


END = (1,)
"""Of the base files; those tuned for chats end turns too: 107 of Gemma 2, 106 of Gemma 3."""
TINY: dict[str, Any] = {
    "vocab": 97,
    "width": 48,
    "heads": 4,
    "groups": 2,
    "head_width": 16,
    "hidden": 96,
    "context": 256,
    "scalar": 20.0,
}

MULTIMODAL = "text; within a multimodal model"
PAGE = Page(
    name="gemma",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=fill_by_depth_,
    names=names,
    read=read,
    publish=publish,
    also=("gemma2",),
    presets=(
        Preset("gemma2-2b", sized2(2304, 26, 8, 4, 256, 9216, 256), 2_614_341_888, "google/gemma-2-2b", eos=END),
        Preset("gemma2-9b", sized2(3584, 42, 16, 8, 256, 14336, 256), 9_241_705_984, "google/gemma-2-9b", eos=END),
        Preset("gemma2-27b", sized2(4608, 46, 32, 16, 128, 36864, 144), 27_227_128_320, "google/gemma-2-27b", eos=END),
        Preset(
            "gemma3-270m", sized3(640, 18, 4, 1, 256, 2048, small=True), 268_098_176, "google/gemma-3-270m", eos=END
        ),
        Preset(
            "gemma3-1b", sized3(1152, 26, 4, 1, 256, 6912, small=True), 999_885_952, "google/gemma-3-1b-pt", eos=END
        ),
        Preset(
            "gemma3-4b",
            sized3(2560, 34, 8, 4, 256, 10240, small=False),
            3_880_263_168,
            "google/gemma-3-4b-pt",
            MULTIMODAL,
            END,
        ),
        Preset(
            "gemma3-12b",
            sized3(3840, 48, 16, 8, 256, 15360, small=False),
            11_766_034_176,
            "google/gemma-3-12b-pt",
            MULTIMODAL,
            END,
        ),
        Preset(
            "gemma3-27b",
            sized3(5376, 62, 32, 16, 128, 21504, small=False, scalar=168),
            27_009_346_304,
            "google/gemma-3-27b-pt",
            MULTIMODAL,
            END,
        ),
        Preset(
            "gemma2-tiny",
            Config(
                **TINY,
                windows=(5, None, 5),
                rotary=Rotary(16, 10_000.0),
                local_rotary=Rotary(16, 10_000.0),
                qk_norm=False,
                attention_cap=2.0,
                final_cap=3.0,
            ),
        ),
        Preset(
            "gemma3-tiny",
            Config(
                **TINY,
                windows=(5, 5, None, 5),
                rotary=Rotary(16, 1_000_000.0, Linear(8.0)),
                local_rotary=Rotary(16, 10_000.0),
                qk_norm=True,
            ),
        ),
    ),
)
