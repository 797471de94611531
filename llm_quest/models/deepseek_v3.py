"""DeepSeek-V3 and R1 (arXiv:2412.19437), also Moonlight and Kimi K2 (same code; Kimi K2's
files name a model_type of their own, which is read, and written as deepseek_v3). What is new after Llama:

- Multi-head latent attention: the cache holds one short vector per token and one rotary key, 576 numbers instead of
  40,960.
- A head's query and key have a part without and a part with rotation; values are narrower.
- Many small experts (256, eight a token) beside one that every token shares; the first layers are dense.
- Routing by sigmoid, within the four best of eight groups; a bias chooses but does not weigh, and keeps the load even
  over batches; a small loss (alpha 0.0001) keeps single sequences from extremes (`objectives/routing.py`).
- YaRN to 163,840 positions: its temperature is applied to the whole score instead of cos and sin.
- Behind the model, modules that predict further tokens (MTP): a denser training signal, and a draft model for free.

Commonly got wrong: rotation pairs are neighbors; the temperature squared multiplies the unrotated part too; the
latents' norms have eps 1e-6 whatever the config says; groups that are dropped get -inf, not 0.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.errors import DataError
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.experts import Experts
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.latent_attention import MultiHeadLatentAttention
from llm_quest.layers.moe import MixtureOfExperts, SigmoidRouter
from llm_quest.layers.multi_token_prediction import make_mtp_module
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding, YaRNScaling, yarn_mscale
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.config_fields import config_dataclass, hf_default, json_field, require_field, rope_field, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family
from llm_quest.models.weight_names import Names, WeightMap, count_mtp_modules, decoder_names, expert_names, swiglu_names


def read_num_heads(c: Any) -> int:
    """num_key_value_heads is the same number, for every head has its own key and value."""
    heads: int = require_field(c.json, "num_attention_heads")
    if (keys := c.json.get("num_key_value_heads")) not in (None, heads):
        raise DataError(
            f"config.json: num_key_value_heads is {keys}, num_attention_heads {heads}; they are one number here"
        )
    return heads


def write_num_heads(heads: int, config: Any) -> dict[str, Any]:
    return {"num_attention_heads": heads, "num_key_value_heads": heads}


@config_dataclass
class Config:
    """V3's numbers, as config.json has them. q_lora_rank (None: no latent), kv_lora_rank: widths of the latents;
    first_k_dense_replace: how many first layers are dense, of width intermediate_size; n_shared_experts: the shared
    expert is as wide as so many; num_nextn_predict_layers: multi-token prediction modules behind the model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int = json_field(read_num_heads, write_num_heads)
    q_lora_rank: int | None = hf_default(1536)
    kv_lora_rank: int = hf_default(512)
    qk_nope_head_dim: int = hf_default(128)
    qk_rope_head_dim: int = hf_default(64)
    v_head_dim: int = hf_default(128)
    first_k_dense_replace: int = hf_default(3)
    intermediate_size: int
    n_routed_experts: int = spelled("n_routed_experts", also=("num_local_experts",), hf_default=256)
    num_experts_per_tok: int = hf_default(8)
    moe_intermediate_size: int = hf_default(2048)
    n_shared_experts: int = hf_default(lambda c: 0 if "n_shared_experts" in c.json else 1)  # null: none
    n_group: int = hf_default(lambda c: 1 if "n_group" in c.json else 8)
    topk_group: int = hf_default(lambda c: 1 if "topk_group" in c.json else 4)
    routed_scaling_factor: float = hf_default(lambda c: 1.0 if "routed_scaling_factor" in c.json else 2.5)
    max_position_embeddings: int = hf_default(4096)
    rotary: RotaryEmbedding = rope_field("qk_rope_head_dim", interleaved=True)
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    num_nextn_predict_layers: int = spelled("num_nextn_predict_layers", also=("num_mtp_layers",), default=0)
    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    moe_layer_freq: Literal[1] = 1

    def __post_init__(self) -> None:
        dense, layers = self.first_k_dense_replace, self.num_hidden_layers
        if type(dense) is not int or not 0 <= dense <= layers:
            raise ValueError(f"first_k_dense_replace is {dense!r}; it counts dense layers: 0 to {layers}")

    @property
    def softmax_scale(self) -> float:
        """The scale of the scores: (qk_nope_head_dim + qk_rope_head_dim)^-0.5, times the square of YaRN's
        temperature."""
        stretch: Any = self.rotary.scaling
        has_temperature = isinstance(stretch, YaRNScaling) and stretch.mscale_all_dim
        m = yarn_mscale(stretch.factor, stretch.mscale_all_dim) if has_temperature else 1.0
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
    width = config.n_shared_experts * config.moe_intermediate_size
    shared = GatedMLP(config.hidden_size, width, F.silu) if width else None
    return MixtureOfExperts(router, experts, shared=shared)


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    D, eps, layers = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
    modules = [make_mtp_module(D, eps, block(config, layers + k)) for k in range(config.num_nextn_predict_layers)]
    return decoder_of_blocks("deepseek_v3", config, block, TokenEmbedding, RMSNorm, mtp_modules=modules)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names. The multi-token modules are published as further layers."""
    names = {name: one for name, one in decoder_names(tied=config.tie_word_embeddings).items() if "{i}" not in name}
    for layer in range(config.num_hidden_layers):
        sparse = layer >= config.first_k_dense_replace
        names |= decoder_layer_names(config, f"blocks.{layer}.", f"model.layers.{layer}.", sparse=sparse)
    for k in range(config.num_nextn_predict_layers):
        ours, theirs = f"mtp_modules.{k}.", f"model.layers.{config.num_hidden_layers + k}."
        parts = {"embed_norm": "enorm", "hidden_norm": "hnorm", "join": "eh_proj", "norm": "shared_head.norm"}
        names |= {f"{ours}{a}.weight": f"{theirs}{b}.weight" for a, b in parts.items()}
        names |= decoder_layer_names(config, f"{ours}block.", theirs, sparse=True)
    return names


def decoder_layer_names(config: Config, ours: str, theirs: str, *, sparse: bool) -> Names:
    """The weight map of one layer."""
    mixer, attention = f"{ours}mixer.layer.", f"{theirs}self_attn."
    ffn, mlp = f"{ours}feed_forward.layer.", f"{theirs}mlp."
    parts = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    direct, ranked = {"q_up": "q_proj"}, {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    parts |= direct if config.q_lora_rank is None else ranked
    names: Names = {f"{mixer}{a}.weight": f"{attention}{b}.weight" for a, b in parts.items()}
    if config.attention_bias:
        names |= {f"{mixer}{a}.bias": f"{attention}{parts[a]}.bias" for a in ("kv_down", "out", "q_down") if a in parts}
    names[f"{ours}mixer.norm.weight"] = f"{theirs}input_layernorm.weight"
    names[f"{ours}feed_forward.norm.weight"] = f"{theirs}post_attention_layernorm.weight"
    if not sparse:
        return names | swiglu_names(ffn, mlp)
    names |= expert_names(config.n_routed_experts, ffn, mlp)
    names[f"{ffn}router.bias"] = f"{mlp}gate.e_score_correction_bias"
    return names | (swiglu_names(f"{ffn}shared.", f"{mlp}shared_experts.") if config.n_shared_experts else {})


def duplicate_weights(config: Config) -> dict[str, str]:
    """Published a second time with every multi-token module: the embedding and the head, which they share."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    layers = [f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers)]
    shared = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": head}
    return {f"{layer}{name}": original for layer in layers for name, original in shared.items()}


V3: dict[str, Any] = {
    "vocab_size": 129_280, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "first_k_dense_replace": 3, "intermediate_size": 18_432, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163_840,
}  # fmt: skip


def deepseek_v3_config(theta: float, scaling: YaRNScaling | None, **changes: Any) -> Config:
    """V3 itself, or another model of the same code by what differs."""
    numbers = V3 | changes
    return Config(**numbers, rotary=RotaryEmbedding(numbers["qk_rope_head_dim"], theta, scaling, interleaved=True))


MOONLIGHT = deepseek_v3_config(
    50_000.0, None, vocab_size=163_840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16,
    q_lora_rank=None, first_k_dense_replace=1, intermediate_size=11_264, n_routed_experts=64, num_experts_per_tok=6,
    moe_intermediate_size=1408, n_shared_experts=2, n_group=1, topk_group=1, routed_scaling_factor=2.446,
    max_position_embeddings=8192, rms_norm_eps=1e-5,
)  # fmt: skip
KIMI_K2 = deepseek_v3_config(
    50_000.0, YaRNScaling(32.0, 4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0), vocab_size=163_840,
    num_attention_heads=64, first_k_dense_replace=1, n_routed_experts=384, n_group=1, topk_group=1,
    routed_scaling_factor=2.827, max_position_embeddings=131_072,
)  # fmt: skip
TINY = deepseek_v3_config(
    10_000.0, YaRNScaling(4.0, 64, mscale=1.0, mscale_all_dim=1.0), vocab_size=97, hidden_size=48, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16,
    first_k_dense_replace=1, intermediate_size=96, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
    n_group=4, topk_group=2, max_position_embeddings=256, num_nextn_predict_layers=2,
)  # fmt: skip
DEEPSEEK_V3 = deepseek_v3_config(10_000.0, YaRNScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0))
NOTE = "R1 has the same numbers; in fp8"

FAMILY = Family(
    name="deepseek_v3",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"deepseek_v3": "DeepseekV3ForCausalLM"},
    extra_model_types=("kimi_k2",),
    duplicate_weights=duplicate_weights,
    resolve_config=count_mtp_modules("model.layers.{i}.eh_proj.weight", first=lambda config: config.num_hidden_layers),
    presets=(
        Preset("deepseek-v3", DEEPSEEK_V3, 671_026_419_200, "deepseek-ai/DeepSeek-V3", NOTE, (1,)),
        Preset("moonlight-16b-a3b", MOONLIGHT, 15_960_110_208, "moonshotai/Moonlight-16B-A3B", "", (163_585,)),
        Preset("kimi-k2", KIMI_K2, 1_026_408_232_448, "moonshotai/Kimi-K2-Base", "in fp8", (163_585,)),
        Preset("deepseek-v3-tiny", TINY),
    ),
)
