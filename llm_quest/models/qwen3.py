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

from llm_quest.contracts import Card, Preset
from llm_quest.errors import DataError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.head import Unembed
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.moe import Experts, MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import Rotary
from llm_quest.models.decoder import Decoder
from llm_quest.models.page import (
    Names,
    Page,
    Published,
    Rows,
    expert_names,
    need,
    only,
    per_layer,
    publish_rotary,
    read_rotary,
    swiglu_names,
)


@dataclass(frozen=True)
class Sparse:
    """The mixture's numbers. layers: which are sparse; hidden: an expert's width."""

    experts: int
    top: int
    hidden: int
    layers: tuple[int, ...]
    renormalize: bool = True
    balance: float = 0.001


@dataclass(frozen=True)
class Config:
    """Qwen3's numbers. hidden: of the dense layers; sparse: the mixture, None in the dense models."""

    vocab: int
    width: int
    layers: int
    heads: int
    groups: int
    head_width: int
    hidden: int
    context: int
    rotary: Rotary
    tied: bool
    sparse: Sparse | None = None
    eps: float = 1e-6
    attention_bias: bool = False


def block(config: Config, layer: int) -> Block:
    """One layer: attention with normalised queries and keys, then SwiGLU or the experts."""
    attention = GroupedQueryAttention(
        config.width,
        heads=config.heads,
        groups=config.groups,
        head_width=config.head_width,
        rotary=config.rotary,
        bias=config.attention_bias,
        out_bias=config.attention_bias,
        q_norm=RMSNorm(config.head_width, config.eps),
        k_norm=RMSNorm(config.head_width, config.eps),
    )
    return Block(
        mixer=Sublayer(RMSNorm(config.width, config.eps), attention),
        ffn=Sublayer(RMSNorm(config.width, config.eps), feed_forward(config, layer)),
    )


def feed_forward(config: Config, layer: int) -> nn.Module:
    """Dense or sparse."""
    sparse = config.sparse
    if sparse is None or layer not in sparse.layers:
        return GatedMLP(config.width, config.hidden, F.silu)
    router = SoftmaxRouter(
        config.width, sparse.experts, top=sparse.top, renormalize=sparse.renormalize, balance=sparse.balance
    )
    return MixtureOfExperts(router, Experts(sparse.experts, config.width, sparse.hidden, F.silu))


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab, config.width)
    return Decoder(
        Card("qwen3", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=RMSNorm(config.width, config.eps),
        head=Unembed(config.width, config.vocab, tied=embed.token if config.tied else None),
    )


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    layer = "model.layers.{i}."
    table: dict[str, Published] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "blocks.{i}.mixer.norm.weight": f"{layer}input_layernorm.weight",
        "blocks.{i}.mixer.layer.q_norm.weight": f"{layer}self_attn.q_norm.weight",
        "blocks.{i}.mixer.layer.k_norm.weight": f"{layer}self_attn.k_norm.weight",
        "blocks.{i}.mixer.layer.qkv.weight": Rows(*(f"{layer}self_attn.{part}_proj.weight" for part in "qkv")),
        "blocks.{i}.mixer.layer.out.weight": f"{layer}self_attn.o_proj.weight",
        "blocks.{i}.ffn.norm.weight": f"{layer}post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tied:
        table["head.weight"] = "lm_head.weight"
    if config.attention_bias:
        table["blocks.{i}.mixer.layer.qkv.bias"] = Rows(*(f"{layer}self_attn.{part}_proj.bias" for part in "qkv"))
        table["blocks.{i}.mixer.layer.out.bias"] = f"{layer}self_attn.o_proj.bias"
    ffn, mlp = "blocks.{i}.ffn.layer.", f"{layer}mlp."
    sparse_layers = config.sparse.layers if config.sparse else ()
    dense_layers = [i for i in range(config.layers) if i not in sparse_layers]
    sparse = expert_names(ffn, mlp, config.sparse.experts) if config.sparse else {}
    dense = swiglu_names(ffn, mlp)
    return per_layer(table, config.layers) | per_layer(dense, dense_layers) | per_layer(sparse, sparse_layers)


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    only(published, "hidden_act", "silu")
    only(published, "use_sliding_window", False)
    width, heads = need(published, "hidden_size"), need(published, "num_attention_heads")
    sparse = published.get("model_type") == "qwen3_moe"
    head_width = published.get("head_dim") or (width // heads if sparse else 128)
    return Config(
        vocab=need(published, "vocab_size"),
        width=width,
        layers=need(published, "num_hidden_layers"),
        heads=heads,
        groups=published.get("num_key_value_heads") or heads,
        head_width=head_width,
        hidden=need(published, "intermediate_size"),
        context=published.get("max_position_embeddings", 32_768),
        rotary=read_rotary(published, head_width),
        tied=published.get("tie_word_embeddings", False),
        sparse=read_sparse(published) if sparse else None,
        eps=published.get("rms_norm_eps", 1e-6),
        attention_bias=published.get("attention_bias", False),
    )


def read_sparse(published: Mapping[str, Any]) -> Sparse:
    """Layer i is sparse iff it is not named as dense and (i+1) divides by the step."""
    step, dense = published.get("decoder_sparse_step", 1), published.get("mlp_only_layers") or ()
    if type(step) is not int or step < 1:
        raise DataError(f"config.json: decoder_sparse_step is {step!r}; every so many layers are sparse: 1 or more")
    return Sparse(
        experts=published.get("num_experts") or published.get("num_local_experts", 128),
        top=published.get("num_experts_per_tok", 8),
        hidden=published.get("moe_intermediate_size", 768),
        layers=tuple(i for i in range(need(published, "num_hidden_layers")) if i not in dense and (i + 1) % step == 0),
        renormalize=published.get("norm_topk_prob", False),
        balance=published.get("router_aux_loss_coef", 0.001),
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    shared = {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        **publish_rotary(config.rotary),
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.eps,
        "attention_bias": config.attention_bias,
        "use_sliding_window": False,
        "hidden_act": "silu",
    }
    sparse = config.sparse
    if sparse is None:
        return shared
    return {
        **shared,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": sparse.experts,
        "num_local_experts": sparse.experts,
        "num_experts_per_tok": sparse.top,
        "moe_intermediate_size": sparse.hidden,
        "norm_topk_prob": sparse.renormalize,
        "router_aux_loss_coef": sparse.balance,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.layers) if i not in sparse.layers],
    }


def sized(
    width: int, layers: int, heads: int, groups: int, hidden: int, *, tied: bool = False, sparse: Sparse | None = None
) -> Config:
    """The published sizes share vocabulary, context, head width and base."""
    rotary = Rotary(128, 1_000_000.0)
    return Config(151_936, width, layers, heads, groups, 128, hidden, 40_960, rotary, tied, sparse)


END = (151_645, 151_643)
PAGE = Page(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    Config=Config,
    assemble=assemble,
    initialize=fill_by_depth_,
    names=names,
    read=read,
    publish=publish,
    also=("qwen3_moe",),
    presets=(
        Preset("qwen3-0.6b", sized(1024, 28, 16, 8, 3072, tied=True), 596_049_920, "Qwen/Qwen3-0.6B", eos=END),
        Preset("qwen3-1.7b", sized(2048, 28, 16, 8, 6144, tied=True), 1_720_574_976, "Qwen/Qwen3-1.7B", eos=END),
        Preset("qwen3-4b", sized(2560, 36, 32, 8, 9728, tied=True), 4_022_468_096, "Qwen/Qwen3-4B", eos=END),
        Preset("qwen3-8b", sized(4096, 36, 32, 8, 12_288), 8_190_735_360, "Qwen/Qwen3-8B", eos=END),
        Preset("qwen3-14b", sized(5120, 40, 40, 8, 17_408), 14_768_307_200, "Qwen/Qwen3-14B", eos=END),
        Preset("qwen3-32b", sized(5120, 64, 64, 8, 25_600), 32_762_123_264, "Qwen/Qwen3-32B", eos=END),
        Preset(
            "qwen3-30b-a3b",
            sized(2048, 48, 32, 4, 6144, sparse=Sparse(128, 8, 768, tuple(range(48)))),
            30_532_122_624,
            "Qwen/Qwen3-30B-A3B",
            eos=END,
        ),
        Preset(
            "qwen3-235b-a22b",
            sized(4096, 94, 64, 4, 12_288, sparse=Sparse(128, 8, 1536, tuple(range(94)))),
            235_093_634_560,
            "Qwen/Qwen3-235B-A22B",
            eos=END,
        ),
        Preset("qwen3-tiny", Config(97, 48, 2, 4, 2, 16, 96, 256, Rotary(16, 1_000_000.0), tied=True)),
        Preset(
            "qwen3-moe-tiny",
            Config(97, 48, 3, 4, 2, 16, 96, 256, Rotary(16, 1_000_000.0), False, Sparse(8, 3, 32, (0, 2))),
        ),
    ),
)
