"""DeepSeek-V3 and R1 (arXiv:2412.19437), also Moonlight and Kimi K2 (same code; Kimi K2's
files name a model_type of their own, which is read, and written as deepseek_v3). What is new after Llama:

- Multi-head latent attention: the cache holds one short vector per token and one rotary key, 576 numbers instead of
  40,960.
- A head's query and key have a part without and a part with rotation; values are narrower.
- Many small experts (256, eight a token) beside one that every token shares; the first layers are dense.
- Routing by sigmoid, within the four best of eight groups; a bias chooses but does not weigh, and keeps the load even
  over batches; a small loss (alpha 0.0001) keeps single sequences from extremes (`objectives/routing.py`).
- YaRN to 163,840 positions: its temperature is applied to the whole score instead of cos and sin.
- Behind the model, modules that predict further tokens: a denser training signal, and a drafter for free.

Commonly got wrong: rotation pairs are neighbours; the temperature squared multiplies the unrotated part too; the
latents' norms have eps 1e-6 whatever the config says; groups that are dropped get -inf, not 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Card, Preset
from llm_quest.errors import DataError
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.head import Unembed
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.latent_attention import LatentAttention
from llm_quest.layers.moe import Experts, MixtureOfExperts, SigmoidRouter
from llm_quest.layers.multi_token import Lookahead
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import Rotary, YaRN, temperature
from llm_quest.models.decoder import Decoder
from llm_quest.models.page import (
    Names,
    Page,
    Published,
    expert_names,
    need,
    only,
    publish_rotary,
    read_rotary,
    swiglu_names,
)


@dataclass(frozen=True)
class Config:
    """V3's numbers. q_rank, kv_rank: the latents; nope, rope, value: widths of a head's parts; dense: how many first
    layers are dense, of width hidden; expert_hidden: an expert's width; shared: how many experts' widths the shared one
    has; the experts lie in expert_groups, of which a token may use top_groups; lookahead: how many multi-token
    prediction modules stand behind the model."""

    vocab: int
    width: int
    layers: int
    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    dense: int
    hidden: int
    experts: int
    top: int
    expert_hidden: int
    shared: int
    expert_groups: int
    top_groups: int
    expert_scale: float
    context: int
    rotary: Rotary
    renormalize: bool = True
    tied: bool = False
    eps: float = 1e-6
    attention_bias: bool = False
    lookahead: int = 0

    @property
    def scale(self) -> float:
        """Of the scores: (nope + rope)^-0.5, times the square of YaRN's temperature."""
        stretch = self.rotary.scaling
        m = (
            temperature(stretch.factor, stretch.mscale_all_dim)
            if isinstance(stretch, YaRN) and stretch.mscale_all_dim
            else 1.0
        )
        return (self.nope + self.rope) ** -0.5 * m * m


def block(config: Config, layer: int) -> Block:
    """One layer: latent attention, then SwiGLU (the first layers) or the experts."""
    attention = LatentAttention(
        config.width,
        heads=config.heads,
        q_rank=config.q_rank,
        kv_rank=config.kv_rank,
        nope=config.nope,
        rope=config.rope,
        value=config.value,
        rotary=config.rotary,
        scale=config.scale,
        bias=config.attention_bias,
    )
    return Block(
        mixer=Sublayer(RMSNorm(config.width, config.eps), attention),
        ffn=Sublayer(RMSNorm(config.width, config.eps), feed_forward(config, layer)),
    )


def feed_forward(config: Config, layer: int) -> nn.Module:
    """Dense at the bottom, sparse above."""
    if layer < config.dense:
        return GatedMLP(config.width, config.hidden, F.silu)
    router = SigmoidRouter(
        config.width,
        config.experts,
        top=config.top,
        groups=config.expert_groups,
        top_groups=config.top_groups,
        renormalize=config.renormalize,
        scale=config.expert_scale,
    )
    experts = Experts(config.experts, config.width, config.expert_hidden, F.silu)
    shared = GatedMLP(config.width, config.shared * config.expert_hidden, F.silu) if config.shared else None
    return MixtureOfExperts(router, experts, shared=shared)


def lookahead(config: Config, k: int) -> Lookahead:
    """Module k predicts one token further than the one before; its block is one more layer of the same kind."""
    embed_norm, hidden_norm, norm = (RMSNorm(config.width, config.eps) for _ in range(3))
    join = nn.Linear(2 * config.width, config.width, bias=False)
    return Lookahead(
        embed_norm=embed_norm, hidden_norm=hidden_norm, join=join, block=block(config, config.layers + k), norm=norm
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab, config.width)
    return Decoder(
        Card("deepseek_v3", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=RMSNorm(config.width, config.eps),
        head=Unembed(config.width, config.vocab, tied=embed.token if config.tied else None),
        lookahead=[lookahead(config, k) for k in range(config.lookahead)],
    )


def names(config: Config) -> Names:
    """Our parameters and their published names. The lookahead modules are published as further layers."""
    table: dict[str, Published] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tied:
        table["head.weight"] = "lm_head.weight"
    for layer in range(config.layers):
        table |= layer_names(config, f"blocks.{layer}.", f"model.layers.{layer}.", sparse=layer >= config.dense)
    for k in range(config.lookahead):
        ours, theirs = f"lookahead.{k}.", f"model.layers.{config.layers + k}."
        table |= layer_names(config, f"{ours}block.", theirs, sparse=True)
        table |= {
            f"{ours}embed_norm.weight": f"{theirs}enorm.weight",
            f"{ours}hidden_norm.weight": f"{theirs}hnorm.weight",
        }
        table |= {
            f"{ours}join.weight": f"{theirs}eh_proj.weight",
            f"{ours}norm.weight": f"{theirs}shared_head.norm.weight",
        }
    return table


def layer_names(config: Config, ours: str, theirs: str, *, sparse: bool) -> dict[str, Published]:
    """One layer's."""
    mixer, attention, ffn, mlp = f"{ours}mixer.layer.", f"{theirs}self_attn.", f"{ours}ffn.layer.", f"{theirs}mlp."
    parts = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    direct, ranked = {"q_up": "q_proj"}, {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    parts |= direct if config.q_rank is None else ranked
    table: dict[str, Published] = {f"{mixer}{a}.weight": f"{attention}{b}.weight" for a, b in parts.items()}
    if config.attention_bias:
        table |= {f"{mixer}{a}.bias": f"{attention}{parts[a]}.bias" for a in ("kv_down", "out", "q_down") if a in parts}
    table[f"{ours}mixer.norm.weight"] = f"{theirs}input_layernorm.weight"
    table[f"{ours}ffn.norm.weight"] = f"{theirs}post_attention_layernorm.weight"
    if not sparse:
        return table | swiglu_names(ffn, mlp)
    table |= expert_names(ffn, mlp, config.experts)
    table[f"{ffn}router.bias"] = f"{mlp}gate.e_score_correction_bias"
    return table | (swiglu_names(f"{ffn}shared.", f"{mlp}shared_experts.") if config.shared else {})


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    only(published, "hidden_act", "silu")
    only(published, "scoring_func", "sigmoid")
    only(published, "topk_method", "noaux_tc")
    only(published, "moe_layer_freq", 1)
    rope, dense = need(published, "qk_rope_head_dim"), dense_layers(published)
    rotary = read_rotary(published, rope)
    return Config(
        vocab=need(published, "vocab_size"),
        width=need(published, "hidden_size"),
        layers=need(published, "num_hidden_layers"),
        heads=need(published, "num_attention_heads"),
        q_rank=published.get("q_lora_rank"),
        kv_rank=need(published, "kv_lora_rank"),
        nope=need(published, "qk_nope_head_dim"),
        rope=rope,
        value=need(published, "v_head_dim"),
        dense=dense,
        hidden=need(published, "intermediate_size"),
        experts=need(published, "n_routed_experts"),
        top=need(published, "num_experts_per_tok"),
        expert_hidden=need(published, "moe_intermediate_size"),
        shared=published.get("n_shared_experts") or 0,
        expert_groups=published.get("n_group") or 1,
        top_groups=published.get("topk_group") or 1,
        expert_scale=float(published.get("routed_scaling_factor") or 1.0),
        context=published.get("max_position_embeddings", 4096),
        rotary=Rotary(rotary.width, rotary.theta, rotary.scaling, interleaved=published.get("rope_interleave", True)),
        renormalize=published.get("norm_topk_prob", True),
        tied=published.get("tie_word_embeddings", False),
        eps=published.get("rms_norm_eps", 1e-6),
        attention_bias=published.get("attention_bias", False),
        lookahead=published.get("num_nextn_predict_layers") or 0,
    )


def dense_layers(published: Mapping[str, Any]) -> int:
    """How many first layers are dense: no more than there are."""
    dense, layers = published.get("first_k_dense_replace", 3), need(published, "num_hidden_layers")
    if type(dense) is not int or not 0 <= dense <= layers:
        raise DataError(f"config.json: first_k_dense_replace is {dense!r}; it counts dense layers: 0 to {layers}")
    return dense


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "q_lora_rank": config.q_rank,
        "kv_lora_rank": config.kv_rank,
        "qk_nope_head_dim": config.nope,
        "qk_rope_head_dim": config.rope,
        "v_head_dim": config.value,
        "first_k_dense_replace": config.dense,
        "intermediate_size": config.hidden,
        "n_routed_experts": config.experts,
        "num_experts_per_tok": config.top,
        "moe_intermediate_size": config.expert_hidden,
        "n_shared_experts": config.shared,
        "n_group": config.expert_groups,
        "topk_group": config.top_groups,
        "routed_scaling_factor": config.expert_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "max_position_embeddings": config.context,
        **publish_rotary(config.rotary),
        "rope_interleave": config.rotary.interleaved,
        "norm_topk_prob": config.renormalize,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.eps,
        "attention_bias": config.attention_bias,
        "num_nextn_predict_layers": config.lookahead,
        "hidden_act": "silu",
    }


def copies(config: Config) -> dict[str, str]:
    """Published a second time with every lookahead module: the embedding and the head, which they share."""
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    layers = [f"model.layers.{config.layers + k}." for k in range(config.lookahead)]
    shared = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": head}
    return {f"{layer}{name}": original for layer in layers for name, original in shared.items()}


def settle(config: Config, stored: Collection[str]) -> Config:
    """As many lookahead modules as the files hold: many conversions leave them out and keep the config."""
    held = 0
    while f"model.layers.{config.layers + held}.eh_proj.weight" in stored:
        held += 1
    return replace(config, lookahead=held)


def published_size(**changes: Any) -> Config:
    """V3 itself, or another model of the same code by what differs."""
    yarn = YaRN(40.0, original=4096, mscale=1.0, mscale_all_dim=1.0)
    attention = {"heads": 128, "q_rank": 1536, "kv_rank": 512, "nope": 128, "rope": 64, "value": 128}
    mixture = {
        "dense": 3,
        "experts": 256,
        "top": 8,
        "expert_hidden": 2048,
        "shared": 1,
        "expert_groups": 8,
        "top_groups": 4,
    }
    rest = {"vocab": 129_280, "width": 7168, "layers": 61, "hidden": 18_432, "expert_scale": 2.5, "context": 163_840}
    rotary = Rotary(64, 10_000.0, yarn, interleaved=True)
    return Config(**{**attention, **mixture, **rest, "rotary": rotary, **changes})


MOONLIGHT = published_size(
    vocab=163_840,
    width=2048,
    layers=27,
    heads=16,
    q_rank=None,
    dense=1,
    hidden=11_264,
    experts=64,
    top=6,
    expert_hidden=1408,
    shared=2,
    expert_groups=1,
    top_groups=1,
    expert_scale=2.446,
    context=8192,
    rotary=Rotary(64, 50_000.0, interleaved=True),
    eps=1e-5,
)
KIMI_K2 = published_size(
    vocab=163_840,
    heads=64,
    dense=1,
    experts=384,
    expert_groups=1,
    top_groups=1,
    expert_scale=2.827,
    context=131_072,
    rotary=Rotary(64, 50_000.0, YaRN(32.0, 4096, fast=1.0, slow=1.0, mscale=1.0, mscale_all_dim=1.0), interleaved=True),
)
TINY = Config(
    vocab=97,
    width=48,
    layers=3,
    heads=4,
    q_rank=24,
    kv_rank=16,
    nope=12,
    rope=8,
    value=16,
    dense=1,
    hidden=96,
    experts=8,
    top=3,
    expert_hidden=32,
    shared=1,
    expert_groups=4,
    top_groups=2,
    expert_scale=2.5,
    context=256,
    rotary=Rotary(8, 10_000.0, YaRN(4.0, original=64, mscale=1.0, mscale_all_dim=1.0), interleaved=True),
)

PAGE = Page(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    also=("kimi_k2",),
    Config=Config,
    assemble=assemble,
    initialize=fill_by_depth_,
    names=names,
    read=read,
    publish=publish,
    copies=copies,
    settle=settle,
    ignore=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    presets=(
        Preset(
            "deepseek-v3",
            published_size(),
            671_026_419_200,
            "deepseek-ai/DeepSeek-V3",
            "R1 has the same numbers; in fp8",
            (1,),
        ),
        Preset("moonlight-16b-a3b", MOONLIGHT, 15_960_110_208, "moonshotai/Moonlight-16B-A3B", eos=(163_585,)),
        Preset("kimi-k2", KIMI_K2, 1_026_408_232_448, "moonshotai/Kimi-K2-Base", "in fp8", (163_585,)),
        Preset("deepseek-v3-tiny", replace(TINY, lookahead=2)),
    ),
)
