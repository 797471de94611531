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

from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.contracts import Card, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.head import Unembed
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.moe import Experts, MixtureOfExperts, SigmoidRouter
from llm_quest.layers.multi_token import Lookahead
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import Rotary
from llm_quest.models.decoder import Decoder
from llm_quest.models.page import (
    Names,
    Page,
    Published,
    Rows,
    each_layer,
    expert_names,
    need,
    only,
    per_layer,
    publish_rotary,
    read_rotary,
    swiglu_names,
)


@dataclass(frozen=True)
class Config:
    """windows: per layer, how many tokens it sees, itself included; None: all. groups, local_groups: key/value heads of
    global and windowed layers; dense: per layer, whether its feed-forward layer is dense, of width hidden; lookahead:
    how many multi-token prediction modules stand behind the model."""

    vocab: int
    width: int
    heads: int
    groups: int
    local_groups: int
    head_width: int
    value_width: int
    value_scale: float
    windows: tuple[int | None, ...]
    dense: tuple[bool, ...]
    hidden: int
    experts: int
    top: int
    expert_hidden: int
    context: int
    rotary: Rotary
    local_rotary: Rotary
    expert_scale: float = 1.0
    renormalize: bool = True
    tied: bool = False
    eps: float = 1e-5
    lookahead: int = 0

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def window(self) -> int | None:
        """Of the windowed layers."""
        return next((window for window in self.windows if window is not None), None)


class Scaled(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def block(config: Config, layer: int) -> Block:
    """One layer, global or windowed: attention, then SwiGLU (the first) or the experts."""
    return Block(
        mixer=Sublayer(RMSNorm(config.width, config.eps), attention(config, config.windows[layer])),
        ffn=Sublayer(RMSNorm(config.width, config.eps), feed_forward(config, layer)),
    )


def attention(config: Config, window: int | None) -> GroupedQueryAttention:
    """Global or windowed."""
    return GroupedQueryAttention(
        config.width,
        heads=config.heads,
        groups=config.groups if window is None else config.local_groups,
        head_width=config.head_width,
        value_width=config.value_width,
        rotary=config.rotary if window is None else config.local_rotary,
        window=window,
        v_norm=Scaled(config.value_scale),
        sinks=window is not None,
    )


def feed_forward(config: Config, layer: int) -> nn.Module:
    """Dense or sparse."""
    if config.dense[layer]:
        return GatedMLP(config.width, config.hidden, F.silu)
    router = SigmoidRouter(
        config.width, config.experts, top=config.top, renormalize=config.renormalize, scale=config.expert_scale
    )
    return MixtureOfExperts(router, Experts(config.experts, config.width, config.expert_hidden, F.silu))


def lookahead(config: Config) -> Lookahead:
    """A module that predicts one token further: its block is windowed and dense."""
    if config.window is None:
        raise ValueError("multi-token modules are windowed, but no layer says how wide: give one of `windows` a number")
    embed_norm, hidden_norm, mixer_norm, ffn_norm, norm = (RMSNorm(config.width, config.eps) for _ in range(5))
    dense = GatedMLP(config.width, config.hidden, F.silu)
    return Lookahead(
        embed_norm=embed_norm,
        hidden_norm=hidden_norm,
        join=nn.Linear(2 * config.width, config.width, bias=False),
        block=Block(Sublayer(mixer_norm, attention(config, config.window)), Sublayer(ffn_norm, dense)),
        norm=norm,
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab, config.width)
    return Decoder(
        Card("mimo", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=RMSNorm(config.width, config.eps),
        head=Unembed(config.width, config.vocab, tied=embed.token if config.tied else None),
        lookahead=[lookahead(config) for _ in range(config.lookahead)],
    )


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    layer = "model.layers.{i}."
    table: dict[str, Published] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": Rows(*(f"{layer}self_attn.{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{layer}self_attn.o_proj.weight",
        "blocks.{i}.ffn.norm.weight": f"{layer}post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tied:
        table["head.weight"] = "lm_head.weight"
    sinks = {"blocks.{i}.mixer.layer.sink": f"{layer}self_attn.attention_sink_bias"}
    ffn, mlp = "blocks.{i}.ffn.layer.", f"{layer}mlp."
    bias = {f"{ffn}router.bias": f"{mlp}gate.e_score_correction_bias"}
    dense, sparse = swiglu_names(ffn, mlp), expert_names(ffn, mlp, config.experts) | bias
    windowed = [i for i, window in enumerate(config.windows) if window is not None]
    kinds = [[i for i, is_dense in enumerate(config.dense) if is_dense is wanted] for wanted in (True, False)]
    written = per_layer(table, config.layers) | per_layer(sinks, windowed)
    written |= per_layer(dense, kinds[0]) | per_layer(sparse, kinds[1])
    return written | per_layer(lookahead_names(), config.lookahead)


def lookahead_names() -> dict[str, Published]:
    """A multi-token prediction module's."""
    ours, theirs = "lookahead.{i}.", "model.mtp.layers.{i}."
    norms = {"embed_norm": "enorm", "hidden_norm": "hnorm", "norm": "final_layernorm"}
    norms |= {"block.mixer.norm": "input_layernorm", "block.ffn.norm": "pre_mlp_layernorm"}
    attention, dense = f"{ours}block.mixer.layer.", swiglu_names(f"{ours}block.ffn.layer.", f"{theirs}mlp.")
    return {f"{ours}{a}.weight": f"{theirs}{b}.weight" for a, b in norms.items()} | {
        f"{ours}join.weight": f"{theirs}eh_proj.weight",
        f"{attention}qkv.weight": Rows(*(f"{theirs}self_attn.{part}_proj.weight" for part in "qkv")),
        f"{attention}out.weight": f"{theirs}self_attn.o_proj.weight",
        f"{attention}sink": f"{theirs}self_attn.attention_sink_bias",
        **dense,
    }


def settle(config: Config, stored: Collection[str]) -> Config:
    """As many lookahead modules as the files hold."""
    held = 0
    while f"model.mtp.layers.{held}.eh_proj.weight" in stored:
        held += 1
    return replace(config, lookahead=held)


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json, with the hub's names first and transformers' second."""
    only(published, "hidden_act", "silu")
    only(published, "scoring_func", "sigmoid")
    only(published, "n_group", 1, None)
    only(published, "topk_group", 1, None)
    only(published, "attention_bias", False, None)
    only(published, "add_swa_attention_sink_bias", True, None)
    only(published, "add_full_attention_sink_bias", False, None)
    layers = need(published, "num_hidden_layers")
    windows, head_width = read_windows(published, layers), published.get("head_dim") or need(published, "swa_head_dim")
    heads, value_width = need(published, "num_attention_heads"), published.get("v_head_dim") or head_width
    only(published, "swa_num_attention_heads", heads, None)
    only(published, "swa_head_dim", head_width, None)
    only(published, "swa_v_head_dim", value_width, None)
    rope = published.get("rope_parameters") or {}
    fraction = published.get("partial_rotary_factor") or rope.get("full_attention", rope).get(
        "partial_rotary_factor", 0.334
    )
    width = int(head_width * fraction)
    full = {**published, "rope_parameters": rope["full_attention"]} if "full_attention" in rope else published
    local = {"rope_parameters": rope.get("sliding_attention"), "rope_theta": published.get("swa_rope_theta", 10_000.0)}
    groups = need(published, "num_key_value_heads")
    dense = [not sparse for sparse in each_layer(published, "moe_layer_freq", layers, 0, 1) or []]
    kinds = each_layer(published, "mlp_layer_types", layers, "dense", "sparse") or []
    dense = dense or [kind == "dense" for kind in kinds] or [i == 0 for i in range(layers)]
    return Config(
        vocab=need(published, "vocab_size"),
        width=need(published, "hidden_size"),
        heads=heads,
        groups=groups,
        local_groups=published.get("swa_num_key_value_heads") or 2 * groups,
        head_width=head_width,
        value_width=value_width,
        value_scale=published.get("attention_value_scale", 0.707),
        windows=windows,
        dense=tuple(dense),
        hidden=need(published, "intermediate_size"),
        experts=need(published, "n_routed_experts"),
        top=need(published, "num_experts_per_tok"),
        expert_hidden=need(published, "moe_intermediate_size"),
        context=published.get("max_position_embeddings", 262_144),
        rotary=read_rotary(full, width, 5_000_000.0),
        local_rotary=read_rotary(local, width),
        expert_scale=float(published.get("routed_scaling_factor") or 1.0),
        renormalize=published.get("norm_topk_prob", True),
        tied=published.get("tie_word_embeddings", False),
        eps=published.get("layernorm_epsilon") or published.get("rms_norm_eps", 1e-5),
        lookahead=published.get("num_nextn_predict_layers") or 0,
    )


def read_windows(published: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """hybrid_layer_pattern (1: windowed) with sliding_window_size, which leaves the token itself out; or layer_types
    with sliding_window, which counts it."""
    previous = published.get("sliding_window_size")
    window = published.get("sliding_window") if previous is None else previous + 1
    kinds = each_layer(published, "layer_types", layers, "full_attention", "sliding_attention") or [
        "full_attention" if i == 0 or (i + 1) % 6 == 0 else "sliding" for i in range(layers)
    ]
    windowed = each_layer(published, "hybrid_layer_pattern", layers, 0, 1) or [
        kind != "full_attention" for kind in kinds
    ]
    return tuple(window or 129 if local else None for local in windowed)


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    windows = [window for window in config.windows if window is not None]
    rope, local = publish_rotary(config.rotary), publish_rotary(config.local_rotary)
    fraction = fraction_of(config.rotary.width, config.head_width)
    per_kind = {
        "full_attention": {**rope["rope_parameters"], "partial_rotary_factor": fraction},
        "sliding_attention": {**local["rope_parameters"], "partial_rotary_factor": fraction},
    }
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "swa_num_key_value_heads": config.local_groups,
        "swa_num_attention_heads": config.heads,
        "head_dim": config.head_width,
        "swa_head_dim": config.head_width,
        "v_head_dim": config.value_width,
        "swa_v_head_dim": config.value_width,
        "attention_value_scale": config.value_scale,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in config.windows],
        "hybrid_layer_pattern": [0 if window is None else 1 for window in config.windows],
        "sliding_window": windows[0] if windows else None,
        "sliding_window_size": windows[0] - 1 if windows else None,
        "mlp_layer_types": ["dense" if dense else "sparse" for dense in config.dense],
        "moe_layer_freq": [0 if dense else 1 for dense in config.dense],
        "intermediate_size": config.hidden,
        "n_routed_experts": config.experts,
        "num_experts_per_tok": config.top,
        "moe_intermediate_size": config.expert_hidden,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": config.context,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": per_kind,
        "swa_rope_theta": local["rope_theta"],
        "partial_rotary_factor": fraction,
        "add_swa_attention_sink_bias": True,
        "routed_scaling_factor": config.expert_scale,
        "norm_topk_prob": config.renormalize,
        "tie_word_embeddings": config.tied,
        "layernorm_epsilon": config.eps,
        "rms_norm_eps": config.eps,
        "hidden_act": "silu",
        "num_nextn_predict_layers": config.lookahead,
    }


def fraction_of(width: int, head_width: int) -> float:
    """A fraction whose product with head_width, rounded down, is width whatever the rounding of the division."""
    return (width + 0.5) / head_width


WINDOWS = tuple(None if i == 0 or (i + 1) % 6 == 0 else 129 for i in range(48))
RELEASED = Config(
    vocab=152_576,
    width=4096,
    heads=64,
    groups=4,
    local_groups=8,
    head_width=192,
    value_width=128,
    value_scale=0.707,
    windows=WINDOWS,
    dense=tuple(i == 0 for i in range(48)),
    hidden=16_384,
    experts=256,
    top=8,
    expert_hidden=2048,
    context=262_144,
    rotary=Rotary(64, 5_000_000.0),
    local_rotary=Rotary(64, 10_000.0),
)
TINY = Config(
    vocab=97,
    width=48,
    heads=8,
    groups=2,
    local_groups=4,
    head_width=24,
    value_width=16,
    value_scale=0.707,
    windows=(None, 5, 5, None),
    dense=(True, False, False, False),
    hidden=96,
    experts=8,
    top=3,
    expert_hidden=32,
    context=256,
    rotary=Rotary(8, 5_000_000.0),
    local_rotary=Rotary(8, 10_000.0),
)

PAGE = Page(
    name="mimo",
    model_type="mimo_v2_flash",
    architecture="MiMoV2FlashForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=fill_by_depth_,
    names=names,
    read=read,
    publish=publish,
    settle=settle,
    presets=(
        Preset(
            "mimo-v2-flash",
            RELEASED,
            308_778_780_864,
            "XiaomiMiMo/MiMo-V2-Flash",
            "without MTP; in fp8",
            (151_645, 151_643),
        ),
        Preset("mimo-tiny", replace(TINY, lookahead=1)),
    ),
)
