"""Qwen3-Next (80B-A3B, 2025) and the text part of Qwen3.5. What is new after Qwen3:

- Three of four layers have no attention but a Gated DeltaNet: a memory of fixed size instead of a growing cache.
- The fourth is attention with an output gate, made beside the query, and rotates only the first quarter of each head.
- Block and q/k norms scale by 1 + weight (the weight centred at zero); the norm inside the DeltaNet does not.
- 512 experts of width 512, ten a token, and a shared one that each token opens by a gate (Qwen3.5: dense or sparse).

Commonly got wrong: query and gate are interleaved per head, not halves of the projection; the rotation's exponents
divide by the rotated width, not the head's; the DeltaNet's norm comes before its gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention, SigmoidOutputGate
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.delta_net import FlatProjection, GatedDeltaNet, InterleavedProjection
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.lm_head import LMHead
from llm_quest.layers.moe import Experts, MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import ZeroCenteredRMSNorm
from llm_quest.layers.packed_linear import PackedLinear
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
    read_per_layer,
    read_rotary,
    require_field,
    require_value,
    swiglu_names,
)


@dataclass(frozen=True)
class DeltaNetConfig:
    """The Gated DeltaNet's numbers. interleaved: Qwen3-Next's layout of its projections; Qwen3.5's is flat."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    interleaved: bool


@dataclass(frozen=True)
class MoEConfig:
    """The mixture's numbers: widths of an expert and of the shared one."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001


@dataclass(frozen=True)
class Config:
    """full_attention_layers: per layer, whether it attends (True) or is a DeltaNet. intermediate_size: width of a dense
    feed-forward layer."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    full_attention_layers: tuple[bool, ...]
    delta_net: DeltaNetConfig
    rotary: RotaryEmbedding
    tie_word_embeddings: bool
    moe: MoEConfig | None = None
    rms_norm_eps: float = 1e-6

    @property
    def num_hidden_layers(self) -> int:
        return len(self.full_attention_layers)


def block(config: Config, layer_idx: int) -> Block:
    """One layer: gated attention or Gated DeltaNet, then SwiGLU or the experts."""
    return Block(
        mixer=Sublayer(ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps), mixer(config, layer_idx)),
        feed_forward=Sublayer(ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps), feed_forward(config)),
    )


def mixer(config: Config, layer_idx: int) -> nn.Module:
    """What moves information between positions in this layer."""
    if config.full_attention_layers[layer_idx]:
        return gated_attention(config)
    delta_net = config.delta_net
    return GatedDeltaNet(
        config.hidden_size,
        num_k_heads=delta_net.linear_num_key_heads,
        num_v_heads=delta_net.linear_num_value_heads,
        head_k_dim=delta_net.linear_key_head_dim,
        head_v_dim=delta_net.linear_value_head_dim,
        conv_kernel_size=delta_net.linear_conv_kernel_dim,
        eps=config.rms_norm_eps,
        inputs=InterleavedProjection if delta_net.interleaved else FlatProjection,
    )


def gated_attention(config: Config) -> GroupedQueryAttention:
    """Grouped-query attention whose output is gated; the gate is projected with the query."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary=config.rotary,
        q_norm=ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps),
        k_norm=ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps),
    )
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention.qkv = PackedLinear(config.hidden_size, q=2 * q_rows, k=kv_rows, v=kv_rows)
    attention.output_gate = SigmoidOutputGate()
    return attention


def feed_forward(config: Config) -> nn.Module:
    """Dense, or experts beside a gated shared one."""
    moe = config.moe
    if moe is None:
        return GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
    return MixtureOfExperts(
        SoftmaxRouter(
            config.hidden_size,
            moe.num_experts,
            top_k=moe.num_experts_per_tok,
            norm_topk_prob=moe.norm_topk_prob,
            aux_loss_coef=moe.router_aux_loss_coef,
        ),
        Experts(moe.num_experts, config.hidden_size, moe.moe_intermediate_size, F.silu),
        shared=GatedMLP(config.hidden_size, moe.shared_expert_intermediate_size, F.silu),
        shared_gate=nn.Linear(config.hidden_size, 1, bias=False),
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab_size, config.hidden_size)
    return Decoder(
        ModelSpec("qwen3_next", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps),
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
        "blocks.{i}.feed_forward.norm.weight": f"{layer}post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        table["head.weight"] = "lm_head.weight"
    attending = [i for i in range(config.num_hidden_layers) if config.full_attention_layers[i]]
    others = [i for i in range(config.num_hidden_layers) if not config.full_attention_layers[i]]
    everywhere = expand_layers(table | feed_forward_names(config), config.num_hidden_layers)
    return (
        everywhere | expand_layers(attention_names(), attending) | expand_layers(delta_names(config.delta_net), others)
    )


def attention_names() -> dict[str, PublishedWeight]:
    theirs = "model.layers.{i}.self_attn."
    return {
        "blocks.{i}.mixer.layer.qkv.weight": ConcatRows(*(f"{theirs}{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{theirs}o_proj.weight",
        "blocks.{i}.mixer.layer.q_norm.weight": f"{theirs}q_norm.weight",
        "blocks.{i}.mixer.layer.k_norm.weight": f"{theirs}k_norm.weight",
    }


def delta_names(delta_net: DeltaNetConfig) -> dict[str, PublishedWeight]:
    ours, theirs = "blocks.{i}.mixer.layer.", "model.layers.{i}.linear_attn."
    flat: dict[str, PublishedWeight] = {
        f"{ours}inputs.qkvz.weight": ConcatRows(f"{theirs}in_proj_qkv.weight", f"{theirs}in_proj_z.weight"),
        f"{ours}inputs.ba.weight": ConcatRows(f"{theirs}in_proj_b.weight", f"{theirs}in_proj_a.weight"),
    }
    woven: dict[str, PublishedWeight] = {
        f"{ours}inputs.{part}.weight": f"{theirs}in_proj_{part}.weight" for part in ("qkvz", "ba")
    }
    return {
        **(woven if delta_net.interleaved else flat),
        f"{ours}conv": f"{theirs}conv1d.weight",
        f"{ours}A_log": f"{theirs}A_log",
        f"{ours}dt_bias": f"{theirs}dt_bias",
        f"{ours}norm.weight": f"{theirs}norm.weight",
        f"{ours}out.weight": f"{theirs}out_proj.weight",
    }


def feed_forward_names(config: Config) -> dict[str, PublishedWeight]:
    ours, theirs = "blocks.{i}.feed_forward.layer.", "model.layers.{i}.mlp."
    if config.moe is None:
        return swiglu_names(ours, theirs)
    return {
        **expert_names(ours, theirs, config.moe.num_experts),
        **swiglu_names(f"{ours}shared.", f"{theirs}shared_expert."),
        f"{ours}shared_gate.weight": f"{theirs}shared_expert_gate.weight",
    }


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    require_value(hf_config, "hidden_act", "silu")
    require_value(hf_config, "attention_bias", False)
    require_value(hf_config, "attn_output_gate", True)
    require_value(hf_config, "decoder_sparse_step", 1)
    require_value({"mlp_only_layers": tuple(hf_config.get("mlp_only_layers") or ())}, "mlp_only_layers", ())
    kind, layers = hf_config.get("model_type", ""), require_field(hf_config, "num_hidden_layers")
    full_attention_interval, head_dim = hf_config.get("full_attention_interval", 4), hf_config.get("head_dim", 256)
    layer_types = read_per_layer(hf_config, "layer_types", layers, "full_attention", "linear_attention")
    rope = hf_config.get("rope_parameters") or {}
    fraction = rope.get("partial_rotary_factor") or hf_config.get("partial_rotary_factor", 0.25)
    sparse = kind == "qwen3_next" or "moe" in kind
    return Config(
        vocab_size=require_field(hf_config, "vocab_size"),
        hidden_size=require_field(hf_config, "hidden_size"),
        num_attention_heads=require_field(hf_config, "num_attention_heads"),
        num_key_value_heads=require_field(hf_config, "num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=hf_config.get("intermediate_size") or 0,
        max_position_embeddings=hf_config.get("max_position_embeddings", 32_768),
        full_attention_layers=tuple(
            layer_types[i] == "full_attention" if layer_types else (i + 1) % full_attention_interval == 0
            for i in range(layers)
        ),
        delta_net=DeltaNetConfig(
            linear_num_key_heads=require_field(hf_config, "linear_num_key_heads"),
            linear_num_value_heads=require_field(hf_config, "linear_num_value_heads"),
            linear_key_head_dim=require_field(hf_config, "linear_key_head_dim"),
            linear_value_head_dim=require_field(hf_config, "linear_value_head_dim"),
            linear_conv_kernel_dim=hf_config.get("linear_conv_kernel_dim", 4),
            interleaved=kind == "qwen3_next",
        ),
        rotary=read_rotary(hf_config, int(head_dim * fraction)),
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
        moe=read_moe(hf_config) if sparse else None,
        rms_norm_eps=hf_config.get("rms_norm_eps", 1e-6),
    )


def read_moe(hf_config: Mapping[str, Any]) -> MoEConfig:
    return MoEConfig(
        num_experts=require_field(hf_config, "num_experts"),
        num_experts_per_tok=require_field(hf_config, "num_experts_per_tok"),
        moe_intermediate_size=require_field(hf_config, "moe_intermediate_size"),
        shared_expert_intermediate_size=require_field(hf_config, "shared_expert_intermediate_size"),
        norm_topk_prob=hf_config.get("norm_topk_prob", True),
        router_aux_loss_coef=hf_config.get("router_aux_loss_coef", 0.001),
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    delta_net, moe, fraction = config.delta_net, config.moe, config.rotary.dim / config.head_dim
    rope = publish_rotary(config.rotary)
    third = config.rotary.dim // 2 // 3
    sections = [config.rotary.dim // 2 - 2 * third, third, third]
    extra = {} if delta_net.interleaved else {"mrope_section": sections, "mrope_interleaved": True}
    kind, architecture = ("qwen3_next", "Qwen3NextForCausalLM")
    if not delta_net.interleaved:
        kind, architecture = ("qwen3_5_text", "Qwen3_5ForCausalLM")
        kind, architecture = ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM") if moe else (kind, architecture)
    shared = {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_types": [
            "full_attention" if attends else "linear_attention" for attends in config.full_attention_layers
        ],
        "linear_num_key_heads": delta_net.linear_num_key_heads,
        "linear_num_value_heads": delta_net.linear_num_value_heads,
        "linear_key_head_dim": delta_net.linear_key_head_dim,
        "linear_value_head_dim": delta_net.linear_value_head_dim,
        "linear_conv_kernel_dim": delta_net.linear_conv_kernel_dim,
        **rope,
        "rope_parameters": {**rope["rope_parameters"], "partial_rotary_factor": fraction, **extra},
        "partial_rotary_factor": fraction,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "hidden_act": "silu",
    }
    if moe is None:
        return shared
    return {
        **shared,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "shared_expert_intermediate_size": moe.shared_expert_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "router_aux_loss_coef": moe.router_aux_loss_coef,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def every_fourth_layer(num_hidden_layers: int) -> tuple[bool, ...]:
    return tuple((i + 1) % 4 == 0 for i in range(num_hidden_layers))


def qwen35_config(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    linear_num_value_heads: int,
    *,
    tie_word_embeddings: bool,
    moe: MoEConfig | None = None,
) -> Config:
    """Qwen3.5's sizes share vocabulary, context, head width, pattern and the DeltaNet's widths."""
    delta_net = DeltaNetConfig(16, linear_num_value_heads, 128, 128, 4, interleaved=False)
    rotary = RotaryEmbedding(64, 10_000_000.0)
    return Config(
        248_320,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        256,
        intermediate_size,
        262_144,
        every_fourth_layer(num_hidden_layers),
        delta_net,
        rotary,
        tie_word_embeddings,
        moe,
    )


QWEN3_NEXT_80B = Config(
    vocab_size=151_936,
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    intermediate_size=5120,
    max_position_embeddings=262_144,
    full_attention_layers=every_fourth_layer(48),
    delta_net=DeltaNetConfig(16, 32, 128, 128, 4, interleaved=True),
    rotary=RotaryEmbedding(64, 10_000_000.0),
    tie_word_embeddings=False,
    moe=MoEConfig(512, 10, 512, 512),
)
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
EOS_TOKEN_IDS = (248_046, 248_044)

MULTIMODAL = "text; within a multimodal model"
FAMILY = Family(
    name="qwen3_next",
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=init_depth_scaled_,
    names=names,
    read=read,
    publish=publish,
    extra_model_types=("qwen3_5_text", "qwen3_5_moe_text"),
    keys_to_ignore=(r"mtp\..*",),
    presets=(
        Preset(
            "qwen3-next-80b-a3b",
            QWEN3_NEXT_80B,
            79_674_391_296,
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            "without MTP",
            (151_645, 151_643),
        ),
        Preset(
            "qwen3.5-0.8b",
            qwen35_config(1024, 24, 8, 2, 3584, 16, tie_word_embeddings=True),
            752_393_024,
            "Qwen/Qwen3.5-0.8B",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3.5-2b",
            qwen35_config(2048, 24, 8, 2, 6144, 16, tie_word_embeddings=True),
            1_881_825_088,
            "Qwen/Qwen3.5-2B",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3.5-4b",
            qwen35_config(2560, 32, 16, 4, 9216, 32, tie_word_embeddings=True),
            4_205_751_296,
            "Qwen/Qwen3.5-4B",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3.5-9b",
            qwen35_config(4096, 32, 16, 4, 12_288, 32, tie_word_embeddings=False),
            8_953_803_264,
            "Qwen/Qwen3.5-9B",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3.5-27b",
            qwen35_config(5120, 64, 24, 4, 17_408, 48, tie_word_embeddings=False),
            26_895_998_464,
            "Qwen/Qwen3.5-27B",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3.5-35b-a3b",
            qwen35_config(2048, 40, 16, 2, 0, 32, tie_word_embeddings=False, moe=MoEConfig(256, 8, 512, 512)),
            34_660_610_688,
            "Qwen/Qwen3.5-35B-A3B",
            MULTIMODAL,
            EOS_TOKEN_IDS,
        ),
        Preset(
            "qwen3-next-tiny",
            Config(
                **TINY,
                full_attention_layers=every_fourth_layer(4),
                delta_net=DeltaNetConfig(2, 4, 8, 12, 4, interleaved=True),
                rotary=RotaryEmbedding(8, 10_000_000.0),
                tie_word_embeddings=False,
                moe=MoEConfig(8, 3, 32, 32),
            ),
        ),
        Preset(
            "qwen3.5-tiny",
            Config(
                **TINY,
                full_attention_layers=every_fourth_layer(4),
                delta_net=DeltaNetConfig(2, 4, 8, 12, 4, interleaved=False),
                rotary=RotaryEmbedding(8, 10_000_000.0),
                tie_word_embeddings=True,
            ),
        ),
    ),
)
