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

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.experts import Experts
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.linear import Linear, PackedLinear
from llm_quest.layers.moe import MixtureOfExperts, SigmoidRouter
from llm_quest.layers.multi_token_prediction import make_mtp_module
from llm_quest.layers.norm import ConstantScale, RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.config_fields import (
    config_dataclass,
    hf_default,
    json_field,
    local_rope_field,
    per_layer,
    rope_field,
    spelled,
    spelled_alike,
)
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family
from llm_quest.models.weight_names import (
    Names,
    attention_names,
    count_mtp_modules,
    decoder_names,
    expand_layers,
    expert_names,
    layer_names,
    swiglu_names,
)
from llm_quest.models.windows import FULL, SLIDING, layer_window


def hybrid_pattern(num_hidden_layers: int) -> tuple[str, ...]:
    """Layer 0 and every sixth see everything, the others their window."""
    return tuple(FULL if i == 0 or (i + 1) % 6 == 0 else SLIDING for i in range(num_hidden_layers))


def mlp_pattern(num_hidden_layers: int) -> tuple[str, ...]:
    """The first layer is dense, the others are sparse."""
    return ("dense", *("sparse",) * (num_hidden_layers - 1))


def read_sliding_window(c: Any) -> int:
    """sliding_window_size (the hub's) leaves the token itself out; sliding_window (transformers') counts it."""
    previous = c.json.get("sliding_window_size")
    window = c.json.get("sliding_window") if previous is None else previous + 1
    return window or 129


def write_sliding_window(window: int, config: Any) -> dict[str, Any]:
    return {"sliding_window": window, "sliding_window_size": window - 1}


@config_dataclass
class Config:
    """MiMo's numbers, in transformers' spelling; the hub's is read and written too. layer_types: full_attention or
    sliding_attention; sliding_window: how many tokens a windowed layer sees, itself included; num_key_value_heads of
    global, swa_num_key_value_heads of windowed layers; mlp_layer_types: dense (of width intermediate_size) or sparse;
    num_nextn_predict_layers: multi-token prediction modules behind the model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int = spelled_alike("num_attention_heads", "swa_num_attention_heads")
    num_key_value_heads: int
    swa_num_key_value_heads: int = hf_default(lambda c: 2 * c.num_key_value_heads)
    head_dim: int = spelled_alike("head_dim", "swa_head_dim")
    v_head_dim: int = spelled_alike("v_head_dim", "swa_v_head_dim", hf_default=lambda c: 128)
    attention_value_scale: float = hf_default(0.707)
    layer_types: tuple[str, ...] = per_layer(
        FULL, SLIDING, numbered="hybrid_layer_pattern", hf_default=lambda c: hybrid_pattern(c.num_hidden_layers)
    )
    sliding_window: int = json_field(read_sliding_window, write_sliding_window)
    mlp_layer_types: tuple[str, ...] = per_layer(
        "dense", "sparse", numbered="moe_layer_freq", hf_default=lambda c: mlp_pattern(c.num_hidden_layers)
    )
    intermediate_size: int
    n_routed_experts: int = spelled("n_routed_experts", also=("num_local_experts",))
    num_experts_per_tok: int
    moe_intermediate_size: int
    max_position_embeddings: int = hf_default(131_072)
    rotary: RotaryEmbedding = rope_field(theta=5_000_000.0, partial=0.334, rope_scaling=False)
    swa_rotary: RotaryEmbedding = local_rope_field("swa_rope_theta", partial=True)
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    rms_norm_eps: float = spelled("layernorm_epsilon", "rms_norm_eps", default=1e-5)
    num_nextn_predict_layers: int = 0
    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    n_group: Literal[1] = 1
    topk_group: Literal[1] = 1
    attention_bias: Literal[False] = False
    add_swa_attention_sink_bias: Literal[True] = True
    add_full_attention_sink_bias: Literal[False] = False


def block(config: Config, layer_idx: int) -> Block:
    """One layer, global or windowed: attention, then SwiGLU (the first) or the experts."""
    window = layer_window(config, layer_idx)
    return Block(
        mixer=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), attention(config, window)),
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
    if config.mlp_layer_types[layer_idx] == "dense":
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


def mtp_block(config: Config) -> Block:
    """The block of a multi-token prediction module: windowed and dense."""
    mixer_norm, ffn_norm = (RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
    dense = GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
    return Block(Sublayer(mixer_norm, attention(config, config.sliding_window)), Sublayer(ffn_norm, dense))


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    D, eps = config.hidden_size, config.rms_norm_eps
    modules = [make_mtp_module(D, eps, mtp_block(config)) for _ in range(config.num_nextn_predict_layers)]
    return decoder_of_blocks("mimo", config, block, TokenEmbedding, RMSNorm, mtp_modules=modules)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings) | attention_names()
    sinks = layer_names({"mixer.layer.attend.sink": "self_attn.attention_sink_bias"})
    bias = layer_names({"feed_forward.layer.router.bias": "mlp.gate.e_score_correction_bias"})
    windowed = (i for i, kind in enumerate(config.layer_types) if kind == SLIDING)
    dense = (i for i, kind in enumerate(config.mlp_layer_types) if kind == "dense")
    sparse = (i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse")
    names = expand_layers(table, config.num_hidden_layers) | expand_layers(sinks, windowed)
    names |= expand_layers(swiglu_names(), dense) | expand_layers(expert_names(config.n_routed_experts) | bias, sparse)
    return names | expand_layers(mtp_names(), config.num_nextn_predict_layers)


def mtp_names() -> Names:
    """A multi-token prediction module's."""
    ours, theirs = "mtp_modules.{i}.", "model.mtp.layers.{i}."
    norms = {"embed_norm": "enorm", "hidden_norm": "hnorm", "norm": "final_layernorm"}
    norms |= {"block.mixer.norm": "input_layernorm", "block.feed_forward.norm": "pre_mlp_layernorm"}
    return {
        **{f"{ours}{a}.weight": f"{theirs}{b}.weight" for a, b in norms.items()},
        f"{ours}join.weight": f"{theirs}eh_proj.weight",
        **attention_names(f"{ours}block.mixer.layer.", f"{theirs}self_attn."),
        f"{ours}block.mixer.layer.attend.sink": f"{theirs}self_attn.attention_sink_bias",
        **swiglu_names(f"{ours}block.feed_forward.layer.", f"{theirs}mlp."),
    }


MIMO_V2_FLASH = Config(
    vocab_size=152_576, hidden_size=4096, num_hidden_layers=48, num_attention_heads=64, num_key_value_heads=4,
    swa_num_key_value_heads=8, head_dim=192, v_head_dim=128, attention_value_scale=0.707, sliding_window=129,
    layer_types=hybrid_pattern(48), mlp_layer_types=mlp_pattern(48), intermediate_size=16_384, n_routed_experts=256,
    num_experts_per_tok=8, moe_intermediate_size=2048, max_position_embeddings=262_144,
    rotary=RotaryEmbedding(64, 5_000_000.0), swa_rotary=RotaryEmbedding(64, 10_000.0),
)  # fmt: skip
TINY = Config(
    vocab_size=97, hidden_size=48, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    swa_num_key_value_heads=4, head_dim=24, v_head_dim=16, attention_value_scale=0.707,
    layer_types=(FULL, SLIDING, SLIDING, FULL), sliding_window=5, mlp_layer_types=mlp_pattern(4),
    intermediate_size=96, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
    max_position_embeddings=256, rotary=RotaryEmbedding(8, 5_000_000.0), swa_rotary=RotaryEmbedding(8, 10_000.0),
    num_nextn_predict_layers=1,
)  # fmt: skip
FLASH_NOTE, EOS_TOKEN_IDS = "without MTP; in fp8", (151_645, 151_643)

FAMILY = Family(
    name="mimo",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"mimo_v2_flash": "MiMoV2FlashForCausalLM"},
    classifiers={"mimo_v2_flash": None},
    resolve_config=count_mtp_modules("model.mtp.layers.{i}.eh_proj.weight"),
    presets=(
        Preset("mimo-v2-flash", MIMO_V2_FLASH, 308_778_780_864, "XiaomiMiMo/MiMo-V2-Flash", FLASH_NOTE, EOS_TOKEN_IDS),
        Preset("mimo-tiny", TINY),
    ),
)
