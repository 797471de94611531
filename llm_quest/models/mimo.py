"""MiMo-V2-Flash (Xiaomi 2026, arXiv:2601.02780). What is new after Llama:

- Five of six layers look back 128 tokens only; windowed and global layers have their own base and their own number of
  key/value heads (windowed: twice as many).
- Windowed layers have attention sinks: a learned logit per head that takes weight and brings nothing.
- Value heads (128) are narrower than query heads (192) and are scaled by 0.707 before they are remembered.
- Only the first third of a head is rotated.
- DeepSeek's router without groups and without a shared expert; the first layer is dense.
- Behind the model, three small modules that predict further tokens: windowed and dense, a third of a billion each.

Commonly got wrong: the released `sliding_window_size: 128` counts *previous* tokens, the token itself comes on top;
layer 0 is global although the pattern says every sixth. config.json does not say how many modules the files hold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.linear import Linear
from llm_quest.layers.lm_head import LMHead
from llm_quest.layers.moe import Experts, MixtureOfExperts, SigmoidRouter
from llm_quest.layers.multi_token_prediction import MTPModule
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.packed_linear import PackedLinear
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import (
    ConcatRows,
    Family,
    PublishedWeight,
    WeightMap,
    expand_layers,
    expert_names,
    publish_rotary,
    read_per_layer,
    read_rotary,
    require_field,
    require_value,
    swiglu_names,
)


@dataclass(frozen=True)
class Config:
    """sliding_windows: per layer, how many tokens it sees, itself included; None: all. num_key_value_heads,
    swa_num_key_value_heads: key/value heads of global and windowed layers; dense_layers: per layer, whether its
    feed-forward layer is dense, of width hidden; num_nextn_predict_layers: how many multi-token prediction modules
    stand behind the model."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    swa_num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    attention_value_scale: float
    sliding_windows: tuple[int | None, ...]
    dense_layers: tuple[bool, ...]
    intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    max_position_embeddings: int
    rotary: RotaryEmbedding
    swa_rotary: RotaryEmbedding
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    num_nextn_predict_layers: int = 0

    @property
    def num_hidden_layers(self) -> int:
        return len(self.sliding_windows)

    @property
    def sliding_window(self) -> int | None:
        """Of the windowed layers."""
        return next((window for window in self.sliding_windows if window is not None), None)


class ConstantScale(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def block(config: Config, layer_idx: int) -> Block:
    """One layer, global or windowed: attention, then SwiGLU (the first) or the experts."""
    return Block(
        mixer=Sublayer(
            RMSNorm(config.hidden_size, config.rms_norm_eps), attention(config, config.sliding_windows[layer_idx])
        ),
        feed_forward=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), feed_forward(config, layer_idx)),
    )


def attention(config: Config, sliding_window: int | None) -> GroupedQueryAttention:
    """Global or windowed; values are narrower than keys, and scaled."""
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads if sliding_window is None else config.swa_num_key_value_heads
    sink = None if sliding_window is None else nn.Parameter(torch.zeros(heads))
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=config.head_dim,
        rotary=config.rotary if sliding_window is None else config.swa_rotary,
        sliding_window=sliding_window,
        attend=ScaledDotProduct(config.head_dim**-0.5, sink=sink),
    )
    q_rows, k_rows, v_rows = heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.v_head_dim
    attention.qkv = PackedLinear(config.hidden_size, q=q_rows, k=k_rows, v=v_rows)
    attention.v_norm = ConstantScale(config.attention_value_scale)
    attention.out = Linear(heads * config.v_head_dim, config.hidden_size, bias=False)
    return attention


def feed_forward(config: Config, layer_idx: int) -> nn.Module:
    """Dense or sparse."""
    if config.dense_layers[layer_idx]:
        return GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
    router = SigmoidRouter(
        config.hidden_size,
        config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    return MixtureOfExperts(
        router, Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, F.silu)
    )


def mtp_module(config: Config) -> MTPModule:
    """A module that predicts one token further: its block is windowed and dense."""
    if config.sliding_window is None:
        raise ValueError("multi-token modules are windowed, but no layer says how wide: give one of `windows` a number")
    embed_norm, hidden_norm, mixer_norm, ffn_norm, norm = (
        RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(5)
    )
    dense = GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
    return MTPModule(
        embed_norm=embed_norm,
        hidden_norm=hidden_norm,
        join=nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False),
        block=Block(Sublayer(mixer_norm, attention(config, config.sliding_window)), Sublayer(ffn_norm, dense)),
        norm=norm,
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab_size, config.hidden_size)
    return Decoder(
        ModelSpec("mimo", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        head=LMHead(
            config.hidden_size, config.vocab_size, tied_embedding=embed.token if config.tie_word_embeddings else None
        ),
        mtp_modules=[mtp_module(config) for _ in range(config.num_nextn_predict_layers)],
    )


def names(config: Config) -> WeightMap:
    """Our parameters and their published names."""
    layer = "model.layers.{i}."
    table: dict[str, PublishedWeight] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": ConcatRows(*(f"{layer}self_attn.{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{layer}self_attn.o_proj.weight",
        "blocks.{i}.feed_forward.norm.weight": f"{layer}post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        table["head.weight"] = "lm_head.weight"
    sinks = {"blocks.{i}.mixer.layer.attend.sink": f"{layer}self_attn.attention_sink_bias"}
    ffn, mlp = "blocks.{i}.feed_forward.layer.", f"{layer}mlp."
    bias = {f"{ffn}router.bias": f"{mlp}gate.e_score_correction_bias"}
    dense, sparse = swiglu_names(ffn, mlp), expert_names(ffn, mlp, config.n_routed_experts) | bias
    windowed = [i for i, window in enumerate(config.sliding_windows) if window is not None]
    kinds = [[i for i, is_dense in enumerate(config.dense_layers) if is_dense is wanted] for wanted in (True, False)]
    written = expand_layers(table, config.num_hidden_layers) | expand_layers(sinks, windowed)
    written |= expand_layers(dense, kinds[0]) | expand_layers(sparse, kinds[1])
    return written | expand_layers(mtp_names(), config.num_nextn_predict_layers)


def mtp_names() -> dict[str, PublishedWeight]:
    """A multi-token prediction module's."""
    ours, theirs = "mtp_modules.{i}.", "model.mtp.layers.{i}."
    norms = {"embed_norm": "enorm", "hidden_norm": "hnorm", "norm": "final_layernorm"}
    norms |= {"block.mixer.norm": "input_layernorm", "block.feed_forward.norm": "pre_mlp_layernorm"}
    attention, dense = f"{ours}block.mixer.layer.", swiglu_names(f"{ours}block.feed_forward.layer.", f"{theirs}mlp.")
    return {f"{ours}{a}.weight": f"{theirs}{b}.weight" for a, b in norms.items()} | {
        f"{ours}join.weight": f"{theirs}eh_proj.weight",
        f"{attention}qkv.weight": ConcatRows(*(f"{theirs}self_attn.{part}_proj.weight" for part in "qkv")),
        f"{attention}out.weight": f"{theirs}self_attn.o_proj.weight",
        f"{attention}attend.sink": f"{theirs}self_attn.attention_sink_bias",
        **dense,
    }


def resolve_config(config: Config, stored: Collection[str]) -> Config:
    """As many lookahead modules as the files hold."""
    num_modules = 0
    while f"model.mtp.layers.{num_modules}.eh_proj.weight" in stored:
        num_modules += 1
    return replace(config, num_nextn_predict_layers=num_modules)


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json, with the hub's names first and transformers' second."""
    require_value(hf_config, "hidden_act", "silu")
    require_value(hf_config, "scoring_func", "sigmoid")
    require_value(hf_config, "n_group", 1, None)
    require_value(hf_config, "topk_group", 1, None)
    require_value(hf_config, "attention_bias", False, None)
    require_value(hf_config, "add_swa_attention_sink_bias", True, None)
    require_value(hf_config, "add_full_attention_sink_bias", False, None)
    num_hidden_layers = require_field(hf_config, "num_hidden_layers")
    sliding_windows, head_dim = (
        read_sliding_windows(hf_config, num_hidden_layers),
        hf_config.get("head_dim") or require_field(hf_config, "swa_head_dim"),
    )
    num_attention_heads, v_head_dim = (
        require_field(hf_config, "num_attention_heads"),
        hf_config.get("v_head_dim") or head_dim,
    )
    require_value(hf_config, "swa_num_attention_heads", num_attention_heads, None)
    require_value(hf_config, "swa_head_dim", head_dim, None)
    require_value(hf_config, "swa_v_head_dim", v_head_dim, None)
    rope = hf_config.get("rope_parameters") or {}
    fraction = hf_config.get("partial_rotary_factor") or rope.get("full_attention", rope).get(
        "partial_rotary_factor", 0.334
    )
    rotary_dim = int(head_dim * fraction)
    full = {**hf_config, "rope_parameters": rope["full_attention"]} if "full_attention" in rope else hf_config
    local = {"rope_parameters": rope.get("sliding_attention"), "rope_theta": hf_config.get("swa_rope_theta", 10_000.0)}
    num_key_value_heads = require_field(hf_config, "num_key_value_heads")
    dense_layers = [not sparse for sparse in read_per_layer(hf_config, "moe_layer_freq", num_hidden_layers, 0, 1) or []]
    kinds = read_per_layer(hf_config, "mlp_layer_types", num_hidden_layers, "dense", "sparse") or []
    dense_layers = dense_layers or [kind == "dense" for kind in kinds] or [i == 0 for i in range(num_hidden_layers)]
    return Config(
        vocab_size=require_field(hf_config, "vocab_size"),
        hidden_size=require_field(hf_config, "hidden_size"),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        swa_num_key_value_heads=hf_config.get("swa_num_key_value_heads") or 2 * num_key_value_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        attention_value_scale=hf_config.get("attention_value_scale", 0.707),
        sliding_windows=sliding_windows,
        dense_layers=tuple(dense_layers),
        intermediate_size=require_field(hf_config, "intermediate_size"),
        n_routed_experts=require_field(hf_config, "n_routed_experts"),
        num_experts_per_tok=require_field(hf_config, "num_experts_per_tok"),
        moe_intermediate_size=require_field(hf_config, "moe_intermediate_size"),
        max_position_embeddings=hf_config.get("max_position_embeddings", 262_144),
        rotary=read_rotary(full, rotary_dim, 5_000_000.0),
        swa_rotary=read_rotary(local, rotary_dim),
        routed_scaling_factor=float(hf_config.get("routed_scaling_factor") or 1.0),
        norm_topk_prob=hf_config.get("norm_topk_prob", True),
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
        rms_norm_eps=hf_config.get("layernorm_epsilon") or hf_config.get("rms_norm_eps", 1e-5),
        num_nextn_predict_layers=hf_config.get("num_nextn_predict_layers") or 0,
    )


def read_sliding_windows(hf_config: Mapping[str, Any], num_hidden_layers: int) -> tuple[int | None, ...]:
    """hybrid_layer_pattern (1: windowed) with sliding_window_size, which leaves the token itself out; or layer_types
    with sliding_window, which counts it."""
    previous = hf_config.get("sliding_window_size")
    window = hf_config.get("sliding_window") if previous is None else previous + 1
    kinds = read_per_layer(hf_config, "layer_types", num_hidden_layers, "full_attention", "sliding_attention") or [
        "full_attention" if i == 0 or (i + 1) % 6 == 0 else "sliding" for i in range(num_hidden_layers)
    ]
    windowed = read_per_layer(hf_config, "hybrid_layer_pattern", num_hidden_layers, 0, 1) or [
        kind != "full_attention" for kind in kinds
    ]
    return tuple(window or 129 if local else None for local in windowed)


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    windows = [window for window in config.sliding_windows if window is not None]
    rope, local = publish_rotary(config.rotary), publish_rotary(config.swa_rotary)
    fraction = rotary_fraction(config.rotary.dim, config.head_dim)
    per_kind = {
        "full_attention": {**rope["rope_parameters"], "partial_rotary_factor": fraction},
        "sliding_attention": {**local["rope_parameters"], "partial_rotary_factor": fraction},
    }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "swa_num_key_value_heads": config.swa_num_key_value_heads,
        "swa_num_attention_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "swa_head_dim": config.head_dim,
        "v_head_dim": config.v_head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "attention_value_scale": config.attention_value_scale,
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in config.sliding_windows
        ],
        "hybrid_layer_pattern": [0 if window is None else 1 for window in config.sliding_windows],
        "sliding_window": windows[0] if windows else None,
        "sliding_window_size": windows[0] - 1 if windows else None,
        "mlp_layer_types": ["dense" if dense else "sparse" for dense in config.dense_layers],
        "moe_layer_freq": [0 if dense else 1 for dense in config.dense_layers],
        "intermediate_size": config.intermediate_size,
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": per_kind,
        "swa_rope_theta": local["rope_theta"],
        "partial_rotary_factor": fraction,
        "add_swa_attention_sink_bias": True,
        "routed_scaling_factor": config.routed_scaling_factor,
        "norm_topk_prob": config.norm_topk_prob,
        "tie_word_embeddings": config.tie_word_embeddings,
        "layernorm_epsilon": config.rms_norm_eps,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
    }


def rotary_fraction(rotary_dim: int, head_dim: int) -> float:
    """A fraction whose product with head_width, rounded down, is width whatever the rounding of the division."""
    return (rotary_dim + 0.5) / head_dim


SLIDING_WINDOWS = tuple(None if i == 0 or (i + 1) % 6 == 0 else 129 for i in range(48))
MIMO_V2_FLASH = Config(
    vocab_size=152_576,
    hidden_size=4096,
    num_attention_heads=64,
    num_key_value_heads=4,
    swa_num_key_value_heads=8,
    head_dim=192,
    v_head_dim=128,
    attention_value_scale=0.707,
    sliding_windows=SLIDING_WINDOWS,
    dense_layers=tuple(i == 0 for i in range(48)),
    intermediate_size=16_384,
    n_routed_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    max_position_embeddings=262_144,
    rotary=RotaryEmbedding(64, 5_000_000.0),
    swa_rotary=RotaryEmbedding(64, 10_000.0),
)
TINY = Config(
    vocab_size=97,
    hidden_size=48,
    num_attention_heads=8,
    num_key_value_heads=2,
    swa_num_key_value_heads=4,
    head_dim=24,
    v_head_dim=16,
    attention_value_scale=0.707,
    sliding_windows=(None, 5, 5, None),
    dense_layers=(True, False, False, False),
    intermediate_size=96,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    max_position_embeddings=256,
    rotary=RotaryEmbedding(8, 5_000_000.0),
    swa_rotary=RotaryEmbedding(8, 10_000.0),
)

FAMILY = Family(
    name="mimo",
    model_type="mimo_v2_flash",
    architecture="MiMoV2FlashForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=init_depth_scaled_,
    names=names,
    read=read,
    publish=publish,
    resolve_config=resolve_config,
    presets=(
        Preset(
            "mimo-v2-flash",
            MIMO_V2_FLASH,
            308_778_780_864,
            "XiaomiMiMo/MiMo-V2-Flash",
            "without MTP; in fp8",
            (151_645, 151_643),
        ),
        Preset("mimo-tiny", replace(TINY, num_nextn_predict_layers=1)),
    ),
)
