"""Qwen3, dense and mixture of experts (Yang et al. 2025, arXiv:2505.09388). What is new after Llama:

- Queries and keys are normalised per head (RMSNorm, one weight shared by all heads) before the rotation.
- The head's width is 128 whatever the model's, so heads times head width may exceed the width of the stream.
- Base 1e6, no stretch; eps 1e-6.
- The large models are sparse: 128 experts, 8 a token, weights renormalised; no shared expert.

Commonly got wrong: q/k norm stands *before* the rotation and has no bias; `norm_topk_prob` is true in the released
models although the class's default is false; `sliding_window` is to be ignored while `use_sliding_window` is false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.errors import DataError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.lm_head import LMHead
from llm_quest.layers.moe import Experts, MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import (
    ConcatRows,
    Family,
    PublishedWeight,
    WeightMap,
    expand_layers,
    expert_names,
    publish_rotary,
    read_rotary,
    require_field,
    require_value,
    swiglu_names,
)


@dataclass(frozen=True)
class MoEConfig:
    """The mixture's numbers. sparse_layers: which are sparse; moe_intermediate_size: an expert's width."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    sparse_layers: tuple[int, ...]
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001


@dataclass(frozen=True)
class Config:
    """Qwen3's numbers. intermediate_size: of the dense layers; moe: the mixture, None in the dense models."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rotary: RotaryEmbedding
    tie_word_embeddings: bool
    moe: MoEConfig | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False


def block(config: Config, layer_idx: int) -> Block:
    """One layer: attention with normalised queries and keys, then SwiGLU or the experts."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary=config.rotary,
        bias=config.attention_bias,
        q_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
        k_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
    )
    return Block(
        mixer=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), attention),
        feed_forward=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), feed_forward(config, layer_idx)),
    )


def feed_forward(config: Config, layer_idx: int) -> nn.Module:
    """Dense or sparse."""
    moe = config.moe
    if moe is None or layer_idx not in moe.sparse_layers:
        return GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
    router = SoftmaxRouter(
        config.hidden_size,
        moe.num_experts,
        top_k=moe.num_experts_per_tok,
        norm_topk_prob=moe.norm_topk_prob,
        aux_loss_coef=moe.router_aux_loss_coef,
    )
    return MixtureOfExperts(router, Experts(moe.num_experts, config.hidden_size, moe.moe_intermediate_size, F.silu))


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab_size, config.hidden_size)
    return Decoder(
        ModelSpec("qwen3", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        head=LMHead(
            config.hidden_size, config.vocab_size, tied_embedding=embed.token if config.tie_word_embeddings else None
        ),
    )


def names(config: Config) -> WeightMap:
    """Our parameters and their published names."""
    layer = "model.layers.{i}."
    table: dict[str, PublishedWeight] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.mixer.layer.q_norm.weight": f"{layer}self_attn.q_norm.weight",
        "blocks.{i}.mixer.layer.k_norm.weight": f"{layer}self_attn.k_norm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": ConcatRows(*(f"{layer}self_attn.{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{layer}self_attn.o_proj.weight",
        "blocks.{i}.feed_forward.norm.weight": f"{layer}post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        table["head.weight"] = "lm_head.weight"
    if config.attention_bias:
        table["blocks.{i}.mixer.layer.qkv.bias"] = ConcatRows(*(f"{layer}self_attn.{part}_proj.bias" for part in "qkv"))
        table["blocks.{i}.mixer.layer.out.bias"] = f"{layer}self_attn.o_proj.bias"
    ffn, mlp = "blocks.{i}.feed_forward.layer.", f"{layer}mlp."
    sparse_layers = config.moe.sparse_layers if config.moe else ()
    dense_layers = [i for i in range(config.num_hidden_layers) if i not in sparse_layers]
    sparse = expert_names(ffn, mlp, config.moe.num_experts) if config.moe else {}
    dense = swiglu_names(ffn, mlp)
    return (
        expand_layers(table, config.num_hidden_layers)
        | expand_layers(dense, dense_layers)
        | expand_layers(sparse, sparse_layers)
    )


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    require_value(hf_config, "hidden_act", "silu")
    require_value(hf_config, "use_sliding_window", False)
    hidden_size, num_attention_heads = (
        require_field(hf_config, "hidden_size"),
        require_field(hf_config, "num_attention_heads"),
    )
    sparse = hf_config.get("model_type") == "qwen3_moe"
    head_dim = hf_config.get("head_dim") or (hidden_size // num_attention_heads if sparse else 128)
    return Config(
        vocab_size=require_field(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=require_field(hf_config, "num_hidden_layers"),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=hf_config.get("num_key_value_heads") or num_attention_heads,
        head_dim=head_dim,
        intermediate_size=require_field(hf_config, "intermediate_size"),
        max_position_embeddings=hf_config.get("max_position_embeddings", 32_768),
        rotary=read_rotary(hf_config, head_dim),
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
        moe=read_moe(hf_config) if sparse else None,
        rms_norm_eps=hf_config.get("rms_norm_eps", 1e-6),
        attention_bias=hf_config.get("attention_bias", False),
    )


def read_moe(hf_config: Mapping[str, Any]) -> MoEConfig:
    """Layer i is sparse iff it is not named as dense and (i+1) divides by the step."""
    step, dense = hf_config.get("decoder_sparse_step", 1), hf_config.get("mlp_only_layers") or ()
    if type(step) is not int or step < 1:
        raise DataError(f"config.json: decoder_sparse_step is {step!r}; every so many layers are sparse: 1 or more")
    return MoEConfig(
        num_experts=hf_config.get("num_experts") or hf_config.get("num_local_experts", 128),
        num_experts_per_tok=hf_config.get("num_experts_per_tok", 8),
        moe_intermediate_size=hf_config.get("moe_intermediate_size", 768),
        sparse_layers=tuple(
            i for i in range(require_field(hf_config, "num_hidden_layers")) if i not in dense and (i + 1) % step == 0
        ),
        norm_topk_prob=hf_config.get("norm_topk_prob", False),
        router_aux_loss_coef=hf_config.get("router_aux_loss_coef", 0.001),
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        **publish_rotary(config.rotary),
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "use_sliding_window": False,
        "hidden_act": "silu",
    }
    moe = config.moe
    if moe is None:
        return shared
    return {
        **shared,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": moe.num_experts,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.num_hidden_layers) if i not in moe.sparse_layers],
    }


def qwen3_config(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    *,
    tie_word_embeddings: bool = False,
    moe: MoEConfig | None = None,
) -> Config:
    """The published sizes share vocabulary, context, head width and base."""
    rotary = RotaryEmbedding(128, 1_000_000.0)
    return Config(
        151_936,
        hidden_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        128,
        intermediate_size,
        40_960,
        rotary,
        tie_word_embeddings,
        moe,
    )


EOS_TOKEN_IDS = (151_645, 151_643)
FAMILY = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=init_depth_scaled_,
    names=names,
    read=read,
    publish=publish,
    extra_model_types=("qwen3_moe",),
    presets=(
        Preset(
            "qwen3-0.6b",
            qwen3_config(1024, 28, 16, 8, 3072, tie_word_embeddings=True),
            596_049_920,
            "Qwen/Qwen3-0.6B",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-1.7b",
            qwen3_config(2048, 28, 16, 8, 6144, tie_word_embeddings=True),
            1_720_574_976,
            "Qwen/Qwen3-1.7B",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-4b",
            qwen3_config(2560, 36, 32, 8, 9728, tie_word_embeddings=True),
            4_022_468_096,
            "Qwen/Qwen3-4B",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-8b",
            qwen3_config(4096, 36, 32, 8, 12_288),
            8_190_735_360,
            "Qwen/Qwen3-8B",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-14b",
            qwen3_config(5120, 40, 40, 8, 17_408),
            14_768_307_200,
            "Qwen/Qwen3-14B",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-32b",
            qwen3_config(5120, 64, 64, 8, 25_600),
            32_762_123_264,
            "Qwen/Qwen3-32B",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-30b-a3b",
            qwen3_config(2048, 48, 32, 4, 6144, moe=MoEConfig(128, 8, 768, tuple(range(48)))),
            30_532_122_624,
            "Qwen/Qwen3-30B-A3B",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-235b-a22b",
            qwen3_config(4096, 94, 64, 4, 12_288, moe=MoEConfig(128, 8, 1536, tuple(range(94)))),
            235_093_634_560,
            "Qwen/Qwen3-235B-A22B",
            eos_token_ids=EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-tiny",
            Config(97, 48, 2, 4, 2, 16, 96, 256, RotaryEmbedding(16, 1_000_000.0), tie_word_embeddings=True),
        ),
        Preset(
            "qwen3-moe-tiny",
            Config(97, 48, 3, 4, 2, 16, 96, 256, RotaryEmbedding(16, 1_000_000.0), False, MoEConfig(8, 3, 32, (0, 2))),
        ),
    ),
)
