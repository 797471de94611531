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

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.errors import DataError
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.latent_attention import MultiHeadLatentAttention
from llm_quest.layers.lm_head import LMHead
from llm_quest.layers.moe import Experts, MixtureOfExperts, SigmoidRouter
from llm_quest.layers.multi_token_prediction import MTPModule
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding, YaRNScaling, yarn_mscale
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import (
    Family,
    PublishedWeight,
    WeightMap,
    expert_names,
    publish_rotary,
    read_rotary,
    require_field,
    require_value,
    swiglu_names,
)


@dataclass(frozen=True)
class Config:
    """V3's numbers. q_lora_rank, kv_lora_rank: the latents; qk_nope_head_dim, qk_rope_head_dim, v_head_dim: widths of a
    head's parts; first_k_dense_replace: how many first layers are dense, of width hidden; moe_intermediate_size: an
    expert's width; n_shared_experts: how many experts' widths the shared one has; the experts lie in expert_groups, of
    which a token may use top_groups; num_nextn_predict_layers: how many multi-token prediction modules stand behind the
    model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    max_position_embeddings: int
    rotary: RotaryEmbedding
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    num_nextn_predict_layers: int = 0

    @property
    def softmax_scale(self) -> float:
        """Of the scores: (nope + rope)^-0.5, times the square of YaRN's temperature."""
        stretch = self.rotary.scaling
        m = (
            yarn_mscale(stretch.factor, stretch.mscale_all_dim)
            if isinstance(stretch, YaRNScaling) and stretch.mscale_all_dim
            else 1.0
        )
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * m * m


def block(config: Config, layer_idx: int) -> Block:
    """One layer: latent attention, then SwiGLU (the first layers) or the experts."""
    attention = MultiHeadLatentAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        rotary=config.rotary,
        attend=ScaledDotProduct(config.softmax_scale),
        bias=config.attention_bias,
    )
    return Block(
        mixer=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), attention),
        feed_forward=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), feed_forward(config, layer_idx)),
    )


def feed_forward(config: Config, layer_idx: int) -> nn.Module:
    """Dense at the bottom, sparse above."""
    if layer_idx < config.first_k_dense_replace:
        return GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
    router = SigmoidRouter(
        config.hidden_size,
        config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    experts = Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, F.silu)
    shared = (
        GatedMLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, F.silu)
        if config.n_shared_experts
        else None
    )
    return MixtureOfExperts(router, experts, shared=shared)


def mtp_module(config: Config, k: int) -> MTPModule:
    """Module k predicts one token further than the one before; its block is one more layer of the same kind."""
    embed_norm, hidden_norm, norm = (RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3))
    join = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
    return MTPModule(
        embed_norm=embed_norm,
        hidden_norm=hidden_norm,
        join=join,
        block=block(config, config.num_hidden_layers + k),
        norm=norm,
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenEmbedding(config.vocab_size, config.hidden_size)
    return Decoder(
        ModelSpec("deepseek_v3", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        head=LMHead(
            config.hidden_size, config.vocab_size, tied_embedding=embed.token if config.tie_word_embeddings else None
        ),
        mtp_modules=[mtp_module(config, k) for k in range(config.num_nextn_predict_layers)],
    )


def names(config: Config) -> WeightMap:
    """Our parameters and their published names. The lookahead modules are published as further layers."""
    table: dict[str, PublishedWeight] = {
        "embed.token.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        table["head.weight"] = "lm_head.weight"
    for layer in range(config.num_hidden_layers):
        table |= layer_names(
            config, f"blocks.{layer}.", f"model.layers.{layer}.", sparse=layer >= config.first_k_dense_replace
        )
    for k in range(config.num_nextn_predict_layers):
        ours, theirs = f"mtp_modules.{k}.", f"model.layers.{config.num_hidden_layers + k}."
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


def layer_names(config: Config, ours: str, theirs: str, *, sparse: bool) -> dict[str, PublishedWeight]:
    """One layer's."""
    mixer, attention, ffn, mlp = (
        f"{ours}mixer.layer.",
        f"{theirs}self_attn.",
        f"{ours}feed_forward.layer.",
        f"{theirs}mlp.",
    )
    parts = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    direct, ranked = {"q_up": "q_proj"}, {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    parts |= direct if config.q_lora_rank is None else ranked
    table: dict[str, PublishedWeight] = {f"{mixer}{a}.weight": f"{attention}{b}.weight" for a, b in parts.items()}
    if config.attention_bias:
        table |= {f"{mixer}{a}.bias": f"{attention}{parts[a]}.bias" for a in ("kv_down", "out", "q_down") if a in parts}
    table[f"{ours}mixer.norm.weight"] = f"{theirs}input_layernorm.weight"
    table[f"{ours}feed_forward.norm.weight"] = f"{theirs}post_attention_layernorm.weight"
    if not sparse:
        return table | swiglu_names(ffn, mlp)
    table |= expert_names(ffn, mlp, config.n_routed_experts)
    table[f"{ffn}router.bias"] = f"{mlp}gate.e_score_correction_bias"
    return table | (swiglu_names(f"{ffn}shared.", f"{mlp}shared_experts.") if config.n_shared_experts else {})


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    require_value(hf_config, "hidden_act", "silu")
    require_value(hf_config, "scoring_func", "sigmoid")
    require_value(hf_config, "topk_method", "noaux_tc")
    require_value(hf_config, "moe_layer_freq", 1)
    qk_rope_head_dim, first_k_dense_replace = require_field(hf_config, "qk_rope_head_dim"), read_dense_layers(hf_config)
    rotary = read_rotary(hf_config, qk_rope_head_dim)
    return Config(
        vocab_size=require_field(hf_config, "vocab_size"),
        hidden_size=require_field(hf_config, "hidden_size"),
        num_hidden_layers=require_field(hf_config, "num_hidden_layers"),
        num_attention_heads=require_field(hf_config, "num_attention_heads"),
        q_lora_rank=hf_config.get("q_lora_rank"),
        kv_lora_rank=require_field(hf_config, "kv_lora_rank"),
        qk_nope_head_dim=require_field(hf_config, "qk_nope_head_dim"),
        qk_rope_head_dim=qk_rope_head_dim,
        v_head_dim=require_field(hf_config, "v_head_dim"),
        first_k_dense_replace=first_k_dense_replace,
        intermediate_size=require_field(hf_config, "intermediate_size"),
        n_routed_experts=require_field(hf_config, "n_routed_experts"),
        num_experts_per_tok=require_field(hf_config, "num_experts_per_tok"),
        moe_intermediate_size=require_field(hf_config, "moe_intermediate_size"),
        n_shared_experts=hf_config.get("n_shared_experts") or 0,
        n_group=hf_config.get("n_group") or 1,
        topk_group=hf_config.get("topk_group") or 1,
        routed_scaling_factor=float(hf_config.get("routed_scaling_factor") or 1.0),
        max_position_embeddings=hf_config.get("max_position_embeddings", 4096),
        rotary=RotaryEmbedding(
            rotary.dim, rotary.rope_theta, rotary.scaling, interleaved=hf_config.get("rope_interleave", True)
        ),
        norm_topk_prob=hf_config.get("norm_topk_prob", True),
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
        rms_norm_eps=hf_config.get("rms_norm_eps", 1e-6),
        attention_bias=hf_config.get("attention_bias", False),
        num_nextn_predict_layers=hf_config.get("num_nextn_predict_layers") or 0,
    )


def read_dense_layers(hf_config: Mapping[str, Any]) -> int:
    """How many first layers are dense: no more than there are."""
    first_k_dense_replace, num_hidden_layers = (
        hf_config.get("first_k_dense_replace", 3),
        require_field(hf_config, "num_hidden_layers"),
    )
    if type(first_k_dense_replace) is not int or not 0 <= first_k_dense_replace <= num_hidden_layers:
        raise DataError(
            f"config.json: first_k_dense_replace is {first_k_dense_replace!r}; it counts dense layers: 0 to {num_hidden_layers}"
        )
    return first_k_dense_replace


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "first_k_dense_replace": config.first_k_dense_replace,
        "intermediate_size": config.intermediate_size,
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_shared_experts": config.n_shared_experts,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "routed_scaling_factor": config.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "max_position_embeddings": config.max_position_embeddings,
        **publish_rotary(config.rotary),
        "rope_interleave": config.rotary.interleaved,
        "norm_topk_prob": config.norm_topk_prob,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "hidden_act": "silu",
    }


def duplicate_weights(config: Config) -> dict[str, str]:
    """Published a second time with every lookahead module: the embedding and the head, which they share."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    layers = [f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers)]
    shared = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": head}
    return {f"{layer}{name}": original for layer in layers for name, original in shared.items()}


def resolve_config(config: Config, stored: Collection[str]) -> Config:
    """As many lookahead modules as the files hold: many conversions leave them out and keep the config."""
    num_modules = 0
    while f"model.layers.{config.num_hidden_layers + num_modules}.eh_proj.weight" in stored:
        num_modules += 1
    return replace(config, num_nextn_predict_layers=num_modules)


def deepseek_v3_config(**changes: Any) -> Config:
    """V3 itself, or another model of the same code by what differs."""
    yarn = YaRNScaling(40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    attention = {
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    mixture = {
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
    }
    rest = {
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "intermediate_size": 18_432,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 163_840,
    }
    rotary = RotaryEmbedding(64, 10_000.0, yarn, interleaved=True)
    return Config(**{**attention, **mixture, **rest, "rotary": rotary, **changes})


MOONLIGHT = deepseek_v3_config(
    vocab_size=163_840,
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    first_k_dense_replace=1,
    intermediate_size=11_264,
    n_routed_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    n_shared_experts=2,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.446,
    max_position_embeddings=8192,
    rotary=RotaryEmbedding(64, 50_000.0, interleaved=True),
    rms_norm_eps=1e-5,
)
KIMI_K2 = deepseek_v3_config(
    vocab_size=163_840,
    num_attention_heads=64,
    first_k_dense_replace=1,
    n_routed_experts=384,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    max_position_embeddings=131_072,
    rotary=RotaryEmbedding(
        64,
        50_000.0,
        YaRNScaling(32.0, 4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
        interleaved=True,
    ),
)
TINY = Config(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
    intermediate_size=96,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    max_position_embeddings=256,
    rotary=RotaryEmbedding(
        8,
        10_000.0,
        YaRNScaling(4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0),
        interleaved=True,
    ),
)

FAMILY = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    extra_model_types=("kimi_k2",),
    Config=Config,
    assemble=assemble,
    initialize=init_depth_scaled_,
    names=names,
    read=read,
    publish=publish,
    duplicate_weights=duplicate_weights,
    resolve_config=resolve_config,
    keys_to_ignore=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    presets=(
        Preset(
            "deepseek-v3",
            deepseek_v3_config(),
            671_026_419_200,
            "deepseek-ai/DeepSeek-V3",
            "R1 has the same numbers; in fp8",
            (1,),
        ),
        Preset(
            "moonlight-16b-a3b", MOONLIGHT, 15_960_110_208, "moonshotai/Moonlight-16B-A3B", eos_token_ids=(163_585,)
        ),
        Preset("kimi-k2", KIMI_K2, 1_026_408_232_448, "moonshotai/Kimi-K2-Base", "in fp8", (163_585,)),
        Preset("deepseek-v3-tiny", replace(TINY, num_nextn_predict_layers=2)),
    ),
)
