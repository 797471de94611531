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

from llm_quest.contracts import Card, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.delta_net import FlatInputs, GatedDeltaNet, WovenInputs
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.head import Unembed
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.moe import Experts, MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import OffsetRMSNorm
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
class Delta:
    """The Gated DeltaNet's numbers. woven: Qwen3-Next's layout of its projections; Qwen3.5's is flat."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    kernel: int
    woven: bool


@dataclass(frozen=True)
class Sparse:
    """The mixture's numbers: widths of an expert and of the shared one."""

    experts: int
    top: int
    hidden: int
    shared: int
    renormalize: bool = True
    balance: float = 0.001


@dataclass(frozen=True)
class Config:
    """attention: per layer, whether it attends (True) or is a DeltaNet. hidden: width of a dense feed-forward layer."""

    vocab: int
    width: int
    heads: int
    groups: int
    head_width: int
    hidden: int
    context: int
    attention: tuple[bool, ...]
    delta: Delta
    rotary: Rotary
    tied: bool
    sparse: Sparse | None = None
    eps: float = 1e-6

    @property
    def layers(self) -> int:
        return len(self.attention)


def block(config: Config, layer: int) -> Block:
    """One layer: gated attention or Gated DeltaNet, then SwiGLU or the experts."""
    return Block(
        mixer=Sublayer(OffsetRMSNorm(config.width, config.eps), mixer(config, layer)),
        ffn=Sublayer(OffsetRMSNorm(config.width, config.eps), feed_forward(config)),
    )


def mixer(config: Config, layer: int) -> nn.Module:
    """What moves information between positions in this layer."""
    if config.attention[layer]:
        return GroupedQueryAttention(
            config.width,
            heads=config.heads,
            groups=config.groups,
            head_width=config.head_width,
            rotary=config.rotary,
            q_norm=OffsetRMSNorm(config.head_width, config.eps),
            k_norm=OffsetRMSNorm(config.head_width, config.eps),
            gated=True,
        )
    delta = config.delta
    return GatedDeltaNet(
        config.width,
        key_heads=delta.key_heads,
        value_heads=delta.value_heads,
        key_width=delta.key_width,
        value_width=delta.value_width,
        kernel=delta.kernel,
        eps=config.eps,
        inputs=WovenInputs if delta.woven else FlatInputs,
    )


def feed_forward(config: Config) -> nn.Module:
    """Dense, or experts beside a gated shared one."""
    sparse = config.sparse
    if sparse is None:
        return GatedMLP(config.width, config.hidden, F.silu)
    return MixtureOfExperts(
        SoftmaxRouter(
            config.width, sparse.experts, top=sparse.top, renormalize=sparse.renormalize, balance=sparse.balance
        ),
        Experts(sparse.experts, config.width, sparse.hidden, F.silu),
        shared=GatedMLP(config.width, sparse.shared, F.silu),
        shared_gate=nn.Linear(config.width, 1, bias=False),
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab, config.width)
    return Decoder(
        Card("qwen3_next", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=OffsetRMSNorm(config.width, config.eps),
        head=Unembed(config.width, config.vocab, tied=embed.token if config.tied else None),
    )


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    layer = "model.layers.{i}."
    table: dict[str, Published] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.ffn.norm.weight": f"{layer}post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tied:
        table["head.weight"] = "lm_head.weight"
    attending = [i for i in range(config.layers) if config.attention[i]]
    others = [i for i in range(config.layers) if not config.attention[i]]
    everywhere = per_layer(table | ffn_names(config), config.layers)
    return everywhere | per_layer(attention_names(), attending) | per_layer(delta_names(config.delta), others)


def attention_names() -> dict[str, Published]:
    theirs = "model.layers.{i}.self_attn."
    return {
        "blocks.{i}.mixer.layer.qkv.weight": Rows(*(f"{theirs}{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{theirs}o_proj.weight",
        "blocks.{i}.mixer.layer.q_norm.weight": f"{theirs}q_norm.weight",
        "blocks.{i}.mixer.layer.k_norm.weight": f"{theirs}k_norm.weight",
    }


def delta_names(delta: Delta) -> dict[str, Published]:
    ours, theirs = "blocks.{i}.mixer.layer.", "model.layers.{i}.linear_attn."
    flat: dict[str, Published] = {
        f"{ours}inputs.qkvz.weight": Rows(f"{theirs}in_proj_qkv.weight", f"{theirs}in_proj_z.weight"),
        f"{ours}inputs.ba.weight": Rows(f"{theirs}in_proj_b.weight", f"{theirs}in_proj_a.weight"),
    }
    woven: dict[str, Published] = {
        f"{ours}inputs.{part}.weight": f"{theirs}in_proj_{part}.weight" for part in ("qkvz", "ba")
    }
    return {
        **(woven if delta.woven else flat),
        f"{ours}conv": f"{theirs}conv1d.weight",
        f"{ours}A_log": f"{theirs}A_log",
        f"{ours}dt_bias": f"{theirs}dt_bias",
        f"{ours}norm.weight": f"{theirs}norm.weight",
        f"{ours}out.weight": f"{theirs}out_proj.weight",
    }


def ffn_names(config: Config) -> dict[str, Published]:
    ours, theirs = "blocks.{i}.ffn.layer.", "model.layers.{i}.mlp."
    if config.sparse is None:
        return swiglu_names(ours, theirs)
    return {
        **expert_names(ours, theirs, config.sparse.experts),
        **swiglu_names(f"{ours}shared.", f"{theirs}shared_expert."),
        f"{ours}shared_gate.weight": f"{theirs}shared_expert_gate.weight",
    }


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    only(published, "hidden_act", "silu")
    only(published, "attention_bias", False)
    only(published, "attn_output_gate", True)
    only(published, "decoder_sparse_step", 1)
    only({"mlp_only_layers": tuple(published.get("mlp_only_layers") or ())}, "mlp_only_layers", ())
    kind, layers = published.get("model_type", ""), need(published, "num_hidden_layers")
    every, head_width = published.get("full_attention_interval", 4), published.get("head_dim", 256)
    kinds = each_layer(published, "layer_types", layers, "full_attention", "linear_attention")
    rope = published.get("rope_parameters") or {}
    fraction = rope.get("partial_rotary_factor") or published.get("partial_rotary_factor", 0.25)
    sparse = kind == "qwen3_next" or "moe" in kind
    return Config(
        vocab=need(published, "vocab_size"),
        width=need(published, "hidden_size"),
        heads=need(published, "num_attention_heads"),
        groups=need(published, "num_key_value_heads"),
        head_width=head_width,
        hidden=published.get("intermediate_size") or 0,
        context=published.get("max_position_embeddings", 32_768),
        attention=tuple(kinds[i] == "full_attention" if kinds else (i + 1) % every == 0 for i in range(layers)),
        delta=Delta(
            key_heads=need(published, "linear_num_key_heads"),
            value_heads=need(published, "linear_num_value_heads"),
            key_width=need(published, "linear_key_head_dim"),
            value_width=need(published, "linear_value_head_dim"),
            kernel=published.get("linear_conv_kernel_dim", 4),
            woven=kind == "qwen3_next",
        ),
        rotary=read_rotary(published, int(head_width * fraction)),
        tied=published.get("tie_word_embeddings", False),
        sparse=read_sparse(published) if sparse else None,
        eps=published.get("rms_norm_eps", 1e-6),
    )


def read_sparse(published: Mapping[str, Any]) -> Sparse:
    return Sparse(
        experts=need(published, "num_experts"),
        top=need(published, "num_experts_per_tok"),
        hidden=need(published, "moe_intermediate_size"),
        shared=need(published, "shared_expert_intermediate_size"),
        renormalize=published.get("norm_topk_prob", True),
        balance=published.get("router_aux_loss_coef", 0.001),
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    delta, sparse, fraction = config.delta, config.sparse, config.rotary.width / config.head_width
    rope = publish_rotary(config.rotary)
    third = config.rotary.width // 2 // 3
    sections = [config.rotary.width // 2 - 2 * third, third, third]
    extra = {} if delta.woven else {"mrope_section": sections, "mrope_interleaved": True}
    kind, architecture = ("qwen3_next", "Qwen3NextForCausalLM")
    if not delta.woven:
        kind, architecture = ("qwen3_5_text", "Qwen3_5ForCausalLM")
        kind, architecture = ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM") if sparse else (kind, architecture)
    shared = {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "layer_types": ["full_attention" if attends else "linear_attention" for attends in config.attention],
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_width,
        "linear_value_head_dim": delta.value_width,
        "linear_conv_kernel_dim": delta.kernel,
        **rope,
        "rope_parameters": {**rope["rope_parameters"], "partial_rotary_factor": fraction, **extra},
        "partial_rotary_factor": fraction,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.eps,
        "attention_bias": False,
        "hidden_act": "silu",
    }
    if sparse is None:
        return shared
    return {
        **shared,
        "num_experts": sparse.experts,
        "num_experts_per_tok": sparse.top,
        "moe_intermediate_size": sparse.hidden,
        "shared_expert_intermediate_size": sparse.shared,
        "norm_topk_prob": sparse.renormalize,
        "router_aux_loss_coef": sparse.balance,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def every_fourth(layers: int) -> tuple[bool, ...]:
    return tuple((i + 1) % 4 == 0 for i in range(layers))


def sized35(
    width: int,
    layers: int,
    heads: int,
    groups: int,
    hidden: int,
    value_heads: int,
    *,
    tied: bool,
    sparse: Sparse | None = None,
) -> Config:
    """Qwen3.5's sizes share vocabulary, context, head width, pattern and the DeltaNet's widths."""
    delta = Delta(16, value_heads, 128, 128, 4, woven=False)
    rotary = Rotary(64, 10_000_000.0)
    return Config(
        248_320, width, heads, groups, 256, hidden, 262_144, every_fourth(layers), delta, rotary, tied, sparse
    )


NEXT = Config(
    vocab=151_936,
    width=2048,
    heads=16,
    groups=2,
    head_width=256,
    hidden=5120,
    context=262_144,
    attention=every_fourth(48),
    delta=Delta(16, 32, 128, 128, 4, woven=True),
    rotary=Rotary(64, 10_000_000.0),
    tied=False,
    sparse=Sparse(512, 10, 512, 512),
)
TINY: dict[str, Any] = {
    "vocab": 97,
    "width": 48,
    "heads": 4,
    "groups": 2,
    "head_width": 32,
    "hidden": 96,
    "context": 256,
}
END = (248_046, 248_044)

MULTIMODAL = "text; within a multimodal model"
PAGE = Page(
    name="qwen3_next",
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=fill_by_depth_,
    names=names,
    read=read,
    publish=publish,
    also=("qwen3_5_text", "qwen3_5_moe_text"),
    ignore=(r"mtp\..*",),
    presets=(
        Preset(
            "qwen3-next-80b-a3b",
            NEXT,
            79_674_391_296,
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            "without MTP",
            (151_645, 151_643),
        ),
        Preset(
            "qwen3.5-0.8b",
            sized35(1024, 24, 8, 2, 3584, 16, tied=True),
            752_393_024,
            "Qwen/Qwen3.5-0.8B",
            MULTIMODAL,
            END,
        ),
        Preset(
            "qwen3.5-2b",
            sized35(2048, 24, 8, 2, 6144, 16, tied=True),
            1_881_825_088,
            "Qwen/Qwen3.5-2B",
            MULTIMODAL,
            END,
        ),
        Preset(
            "qwen3.5-4b",
            sized35(2560, 32, 16, 4, 9216, 32, tied=True),
            4_205_751_296,
            "Qwen/Qwen3.5-4B",
            MULTIMODAL,
            END,
        ),
        Preset(
            "qwen3.5-9b",
            sized35(4096, 32, 16, 4, 12_288, 32, tied=False),
            8_953_803_264,
            "Qwen/Qwen3.5-9B",
            MULTIMODAL,
            END,
        ),
        Preset(
            "qwen3.5-27b",
            sized35(5120, 64, 24, 4, 17_408, 48, tied=False),
            26_895_998_464,
            "Qwen/Qwen3.5-27B",
            MULTIMODAL,
            END,
        ),
        Preset(
            "qwen3.5-35b-a3b",
            sized35(2048, 40, 16, 2, 0, 32, tied=False, sparse=Sparse(256, 8, 512, 512)),
            34_660_610_688,
            "Qwen/Qwen3.5-35B-A3B",
            MULTIMODAL,
            END,
        ),
        Preset(
            "qwen3-next-tiny",
            Config(
                **TINY,
                attention=every_fourth(4),
                delta=Delta(2, 4, 8, 12, 4, woven=True),
                rotary=Rotary(8, 10_000_000.0),
                tied=False,
                sparse=Sparse(8, 3, 32, 32),
            ),
        ),
        Preset(
            "qwen3.5-tiny",
            Config(
                **TINY,
                attention=every_fourth(4),
                delta=Delta(2, 4, 8, 12, 4, woven=False),
                rotary=Rotary(8, 10_000_000.0),
                tied=True,
            ),
        ),
    ),
)
